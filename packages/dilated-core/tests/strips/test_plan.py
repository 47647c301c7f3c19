import torch
from dilated_core import DilatedPattern
from dilated_core.strips.plan import plan_strips
from dilated_core.testing import random_cases
from hypothesis import given, settings
from hypothesis import strategies as st


@settings(max_examples=200, deadline=None)
@given(case=random_cases(), is_contiguous=st.booleans())
def test_strips_visit_each_kept_row_once_per_branch(case, is_contiguous):
    """Counting visits through the views gives, per position and head, the branches that keep it."""
    B, S, H = case.batch_size, case.seq_len, case.num_heads
    visits = torch.zeros(B, S, H, 1, dtype=torch.int64)
    if not is_contiguous:
        visits = torch.zeros(S, H, B, 1, dtype=torch.int64).permute(2, 0, 1, 3)
    dense = visits.stride(0) == S * visits.stride(1)
    for strip in plan_strips(case.pattern, B, S, H, is_batch_dense=dense):
        view = strip.view(visits)
        assert view.numel() == strip.num_elements
        view += 1
    kept = torch.zeros(S, H, dtype=torch.int64)
    for w, r in case.pattern.branches:
        kept += DilatedPattern(
            [w], [r], head_offsets=case.pattern.head_offsets
        ).materialize(S, H).diagonal(dim1=1, dim2=2).T  # a kept row sees itself  # fmt: skip
    assert torch.equal(visits[..., 0], kept.expand(B, S, H))


@settings(max_examples=100, deadline=None)
@given(case=random_cases())
def test_rows_that_attend_together_see_each_other(case):
    """All rows of one problem of a strip are keys of one another in the dense counts."""
    S, H = case.seq_len, case.num_heads
    index = torch.arange(S * H).view(1, S, H)
    counts = torch.zeros(H, S, S, dtype=torch.int64)
    for strip in plan_strips(case.pattern, 1, S, H):
        for problem in strip.view(index).transpose(1, 2).flatten(0, 1):
            rows, heads = problem // H, problem % H
            assert len(set(heads.tolist())) == 1
            counts[heads[0], rows[:, None], rows[None, :]] += 1
    assert torch.equal(counts, case.pattern.materialize(S, H))


def test_few_views_suffice():
    """min(r, ⌈H/r⌉) views per branch when r divides w: five for the usual pattern of 8 heads."""
    pattern = DilatedPattern([64, 128, 256, 512], [1, 2, 4, 8])
    assert len(plan_strips(pattern, 3, 1024, 8)) == 1 + 2 + 2 + 1
    blocked = DilatedPattern([64, 128, 256, 512], [1, 2, 4, 8], head_offsets="blocked")
    assert len(plan_strips(blocked, 3, 1024, 8)) == 1 + 2 + 2 + 1


def test_undilated_branches_come_first():
    strips = plan_strips(DilatedPattern([64, 16], [4, 1]), 1, 64, 8)
    assert [strip.rate for strip in strips] == [1, 4, 4]
    assert [strip.is_first for strip in strips] == [True, False, False]


def test_offsets_beyond_32_bits():
    """Views of a tensor of more than 2^31 elements start where they should (no memory needed)."""
    x = torch.empty(1, 2**24, 8, 64, device="meta")
    last = plan_strips(DilatedPattern([2**10], [4]), 1, 2**24, 8)[-1]
    view = last.view(x)
    reach = view.storage_offset() + sum(
        (n - 1) * s for n, s in zip(view.shape, view.stride(), strict=True)
    )
    assert reach > 2**32
    assert reach < x.numel()
