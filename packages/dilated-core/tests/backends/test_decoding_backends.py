"""A layout gives a backend everything to decode with, and "auto" takes the best that decodes."""

import pytest
import torch
from dilated_core import (
    AttentionOutput,
    DecodingCache,
    DilatedPattern,
    decode_step,
    decode_step_with_lse,
    merge_partials,
    reference_dilated_attention_with_lse,
    register_backend,
    unregister_backend,
)
from dilated_core.backends.eager import EagerBackend
from dilated_core.testing import random_cases
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

PATTERN = DilatedPattern([8, 24, 40], [1, 3, 4])


class ByLayout(EagerBackend):
    """Decodes a head at a time, from what the layout gives to kernels and nothing else."""

    name = "by layout"
    rank = 20
    calls = 0

    def priority_for(self, inputs):
        return self.rank, "made for this test"

    def why_not(self, inputs):
        return ["head_dim is 7."] if inputs.head_dim == 7 else []

    def decode_forward(self, q, k, v, keys, values, layout, *, position, scale):
        self.calls += 1
        assert layout.branch_table.tolist() == [list(branch) for branch in layout.branches]
        heads = []
        for head in range(q.shape[2]):
            query = q[:, 0, head]
            nothing = query.new_full(query.shape[:1], -torch.inf)
            partials = [AttentionOutput(torch.zeros_like(query), nothing)]
            for branch, (w, r) in enumerate(layout.branches):
                row, offset = divmod(position % w, r)
                if offset != layout.offsets[branch, head]:
                    continue
                newest = layout.first_rows[branch, head] + row
                kv_head = head // (q.shape[2] // k.shape[2])
                keys[:, newest], values[:, newest] = k[:, 0, kv_head], v[:, 0, kv_head]
                seen = slice(newest - row, newest + 1)
                scores = (keys[:, seen] @ query[..., None])[..., 0] * scale
                out = (scores.softmax(1)[:, None] @ values[:, seen])[:, 0]
                partials.append(AttentionOutput(out, scores.logsumexp(1)))
            heads.append(merge_partials(partials))
        out, lse = (torch.stack(parts, 1)[:, None] for parts in zip(*heads, strict=True))
        return AttentionOutput(out, lse)


@pytest.fixture
def by_layout():
    backend = ByLayout()
    register_backend(backend)
    yield backend
    unregister_backend("by layout")


def cache_and_tokens(n, *, pattern=PATTERN, head_dim=6, max_seq_len=None):
    sizes = {"batch_size": 2, "num_heads": 4, "num_kv_heads": 2, "head_dim": head_dim}
    cache = DecodingCache(pattern, **sizes, max_seq_len=max_seq_len)
    return cache, [torch.randn(2, n, heads, head_dim) for heads in (4, 2, 2)]


def decode(cache, tensors, start=0, **options):
    """Out and lse of the tokens from `start` on, one by one."""
    steps = [
        decode_step_with_lse(*(x[:, t : t + 1] for x in tensors), cache, **options)
        for t in range(start, tensors[0].shape[1])
    ]
    return tuple(torch.cat(parts, 1) for parts in zip(*steps, strict=True))


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(case=random_cases(max_seq_len=40), prefill=st.integers(0, 30), is_length_known=st.booleans())
def test_the_layout_says_where_the_rows_of_each_head_are(by_layout, case, prefill, is_length_known):
    tensors = [x.detach() for x in case.tensors(dtype=torch.float64)[:3]]
    cache = DecodingCache(
        case.pattern,
        batch_size=case.batch_size,
        num_heads=case.num_heads,
        num_kv_heads=case.num_kv_heads,
        head_dim=case.head_dim,
        dtype=torch.float64,
        max_seq_len=case.seq_len if is_length_known else None,
    )
    prefill = min(prefill, case.seq_len - 1)
    cache.prefill(*(x[:, :prefill] for x in tensors[1:]))
    got = decode(cache, tensors, prefill, scale=case.scale, backend="by layout")
    want = reference_dilated_attention_with_lse(
        *tensors, case.pattern, is_causal=True, scale=case.scale
    )
    for ours, exact in zip(got, want, strict=True):
        torch.testing.assert_close(ours, exact[:, prefill:], rtol=0, atol=1e-12)


@pytest.mark.parametrize("backend", ["eager", "by layout"])
@pytest.mark.parametrize("max_seq_len", [20, None])
def test_lengths_and_rates_beyond_the_integers_of_a_device(by_layout, backend, max_seq_len):
    pattern = DilatedPattern([4, 10**30, 10**40], [1, 10**29, 10**39])
    cache, tensors = cache_and_tokens(20, pattern=pattern, max_seq_len=max_seq_len)
    got = decode(cache, tensors, backend=backend)
    # As long as the sequence is what matters of them.
    pattern = DilatedPattern([4, 20, 20], [1, 20, 20])
    out, lse = reference_dilated_attention_with_lse(*tensors, pattern, is_causal=True)
    torch.testing.assert_close(got, (out.float(), lse.float()), rtol=0, atol=2e-6)


def test_auto_takes_a_backend_that_decodes_unless_it_ranks_below_zero(by_layout):
    """Below zero is Triton's interpreter on CPU."""
    cache, tokens = cache_and_tokens(1)
    decode_step(*tokens, cache)
    assert by_layout.calls == 1
    unregister_backend("by layout")
    by_layout.rank = -1
    register_backend(by_layout)
    decode_step(*tokens, cache)
    decode_step(*tokens, cache, backend="eager")
    assert by_layout.calls == 1
    decode_step(*tokens, cache, backend="by layout")
    assert by_layout.calls == 2


def test_auto_passes_over_backends_without_decoding():
    class Attention:
        name, priority, contract = "attention", 30, EagerBackend.contract
        why_not, forward, backward = (
            EagerBackend.why_not, EagerBackend.forward, EagerBackend.backward
        )  # fmt: skip

    register_backend(Attention())
    try:
        cache, tokens = cache_and_tokens(9)
        got, _ = decode(cache, tokens)
        want = reference_dilated_attention_with_lse(*tokens, PATTERN, is_causal=True).out
        torch.testing.assert_close(got, want.float(), rtol=0, atol=2e-6)
    finally:
        unregister_backend("attention")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda out, lse: (out[:, 0], lse), r"out of shape \(\d, 4, 6\) and lse of shape"),
        (lambda out, lse: (out, lse[..., None]), r"lse of shape \(\d, 1, 4, 1\) for q of shape"),
        (lambda out, lse: (out.double(), lse), "returned out in torch.float64"),
        (lambda out, lse: (out, lse.half()), "lse in torch.float16"),
    ],
)
@pytest.mark.parametrize("runs", [1, 2])
def test_results_are_compared_with_the_contract(by_layout, monkeypatch, change, message, runs):
    """In one run of sequences at a position, and in several."""
    cache, tokens = cache_and_tokens(1)
    if runs == 2:
        cache.prefill(*(x.expand(-1, 3, -1, -1) for x in tokens[1:]), lengths=[3, 1])
    before = cache.positions
    real = by_layout.decode_forward

    def changed(*args, **options):
        return AttentionOutput(*change(*real(*args, **options)))

    monkeypatch.setattr(by_layout, "decode_forward", changed)
    with pytest.raises(ValueError, match=f"backend 'by layout' .*{message}"):
        decode_step(*tokens, cache, backend="by layout")
    assert cache.positions == before


def test_a_choice_does_not_outlive_the_backend():
    backend = ByLayout()
    cache, tokens = cache_and_tokens(1)
    decode_step(*tokens, cache)
    assert backend.calls == 0
    register_backend(backend)
    decode_step(*tokens, cache)
    assert backend.calls == 1
    unregister_backend("by layout")
    decode_step(*tokens, cache)
    assert backend.calls == 1


@pytest.mark.parametrize(
    ("message", "backend", "head_dim"),
    [
        ("'sdpa' cannot run float32 on cpu, 4 heads of 6: it cannot decode. Us", "sdpa", 6),
        ("'by layout' cannot run float32 on cpu, 4 heads of 7: head_dim is 7. Use", "by layout", 7),
        (r"backend is 'elephant'; it must be 'auto' or one of .*'eager'", "elephant", 6),
        (r"backend is None; it must be 'auto' or one of", None, 6),
    ],
)
def test_a_named_backend_never_falls_back(by_layout, message, backend, head_dim):
    cache, tokens = cache_and_tokens(1, head_dim=head_dim)
    decode_step(*tokens, cache)
    before = cache.state_dict()
    with pytest.raises(ValueError, match=message):
        decode_step(*tokens, cache, backend=backend)
    with pytest.raises(ValueError, match=message):
        decode_step_with_lse(*tokens, cache, backend=backend)
    assert all(torch.equal(before[name], x) for name, x in cache.state_dict().items())
    assert by_layout.calls == (0 if head_dim == 7 else 1)
