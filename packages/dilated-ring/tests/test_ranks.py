"""Attention over real ranks, each a process, equals one device: results, gradients, bits."""

from typing import Any

import pytest
import torch
import torch.distributed as dist
from dilated_core import DilatedPattern, dilated_attention, dilated_attention_with_lse
from dilated_core.testing.cases import AWKWARD_CASES, Case
from dilated_core.testing.processes import run_processes
from dilated_ring import ring_dilated_attention, ring_dilated_attention_with_lse
from dilated_ring.layout import spans_of_ranks
from torch.distributed.device_mesh import init_device_mesh

EXCHANGES = ["ring", "all_gather", "all_to_all", "auto"]
LAYOUTS = ["contiguous", "zigzag"]


def my_rows(layout: Any, seq_len: int, rank: int, size: int) -> torch.Tensor:
    spans = spans_of_ranks(layout, seq_len, size)[rank]
    rows = [i for span in spans for i in range(*span)]
    return torch.tensor(rows, dtype=torch.int64)


def worst_error(case: Case, rank: int, size: int, **options: Any) -> float:
    """Distance of this rank's results and gradients from those of the whole on one device."""
    q, k, v, dout = case.tensors(dtype=torch.float64)
    call = case.options()
    exact = dilated_attention_with_lse(q, k, v, case.pattern, **call)
    sees = exact.lse > -torch.inf
    dlse = torch.linspace(-1, 1, sees.numel(), dtype=torch.float64).view(sees.shape)
    dlse = dlse.masked_fill(~sees, 0)
    want = torch.autograd.grad((exact.out, exact.lse), (q, k, v), (dout, dlse))
    rows = my_rows(options.get("layout", "contiguous"), case.seq_len, rank, size)
    dim = 0 if case.documents else 1
    local = [x.detach().index_select(dim, rows).requires_grad_() for x in (q, k, v)]
    if call["key_padding_mask"] is not None:
        call["key_padding_mask"] = call["key_padding_mask"][:, rows]
    got = ring_dilated_attention_with_lse(*local, case.pattern, **call, **options)
    grads = torch.autograd.grad(
        got, local, (dout.index_select(dim, rows), dlse.index_select(dim, rows))
    )
    pairs = [(got.out, exact.out), *zip(grads, want, strict=True)]
    errors = [float((a - b.index_select(dim, rows)).detach().abs().sum()) for a, b in pairs]
    lse = exact.lse.index_select(dim, rows)
    assert torch.equal(got.lse == -torch.inf, lse == -torch.inf)
    errors.append(float((got.lse - lse).detach().nan_to_num(0).abs().sum()))
    return max(errors)


def compare_all() -> float:
    rank, size = dist.get_rank(), dist.get_world_size()
    errors = [0.0]
    for number, case in enumerate(AWKWARD_CASES):
        exchange = EXCHANGES[(number // 2) % 4]
        if exchange == "all_to_all" and (case.num_kv_heads or case.num_heads) < size:
            exchange = "ring"
        layout = LAYOUTS[number % 2]
        errors.append(worst_error(case, rank, size, layout=layout, exchange=exchange))
    return max(errors)


@pytest.mark.parametrize("num_processes", [2, 3, 4])
def test_awkward_cases(num_processes: int) -> None:
    assert max(run_processes(compare_all, num_processes)) < 1e-9


CASE = Case(seq_len=70, num_heads=6, batch_size=2, pattern=DilatedPattern([10, 40, 70], [1, 2, 3]))


def groups_and_meshes() -> list[float]:
    """Rings of ranks that are not 0..n, several at once, and dimensions of a mesh."""
    rank = dist.get_rank()
    errors: list[float] = []
    odd, even = dist.new_group([1, 3]), dist.new_group([2, 0])
    group = odd if rank % 2 else even
    here = dist.get_rank(group)
    # Two rings run at the same time, with different sequences.
    case = Case(seq_len=50 + rank % 2, num_heads=6, pattern=CASE.pattern, is_causal=True)
    errors.append(worst_error(case, here, 2, group=group))
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "cp"))
    errors.append(worst_error(CASE, mesh.get_local_rank("cp"), 2, group=mesh))
    line = init_device_mesh("cpu", (4,))
    errors.append(worst_error(CASE, rank, 4, group=line, layout="zigzag"))
    return errors


def test_groups_and_meshes() -> None:
    assert max(max(errors) for errors in run_processes(groups_and_meshes, 4)) < 1e-9


def two_levels() -> list[float]:
    """Heads inside pairs of neighbours, rows across: rank i of across and j of inside is 2i + j."""
    rank = dist.get_rank()
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("across", "inside"))
    group = (mesh["across"], mesh["inside"])
    pattern = CASE.pattern
    cases = [
        CASE,
        Case(seq_len=9, num_heads=4, num_kv_heads=2, pattern=pattern, is_causal=True),
        Case(seq_len=70, num_heads=5, batch_size=2, masked=0.4, pattern=pattern),
        Case(seq_len=60, documents=(7, 40, 13), num_heads=3, pattern=pattern, is_causal=True),
    ]
    exchanges = ["ring", "all_gather", "auto"]
    return [
        worst_error(case, rank, 4, group=group, layout=layout, exchange=exchange)
        for case in cases
        for layout in LAYOUTS
        for exchange in exchanges
    ]


def test_two_levels() -> None:
    assert max(max(errors) for errors in run_processes(two_levels, 4)) < 1e-9


def uneven_shards() -> float:
    """Contiguous shards may have any lengths, also none; four ranks are two nodes."""
    rank, group = dist.get_rank(), None
    bounds = [0, 31, 31, 70]
    if dist.get_world_size() == 4:
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("across", "inside"))
        group, bounds = (mesh["across"], mesh["inside"]), [0, 31, 31, 47, 70]
    q, k, v, dout = CASE.tensors(dtype=torch.float64)
    exact = dilated_attention(q, k, v, CASE.pattern, is_causal=True)
    want = torch.autograd.grad(exact, (q, k, v), dout)
    rows = slice(bounds[rank], bounds[rank + 1])
    local = [x.detach()[:, rows].requires_grad_() for x in (q, k, v)]
    out = ring_dilated_attention(*local, CASE.pattern, group=group, is_causal=True)
    grads = torch.autograd.grad(out, local, dout[:, rows])
    pairs = [(out, exact), *zip(grads, want, strict=True)]
    return max(float((a - b[:, rows]).detach().abs().sum()) for a, b in pairs)


@pytest.mark.parametrize("num_processes", [3, 4])
def test_uneven_shards(num_processes: int) -> None:
    assert max(run_processes(uneven_shards, num_processes)) < 1e-9


def documents_on_some_ranks() -> float:
    """One dense document: "auto" exchanges heads, also on the rank that holds nothing."""
    bounds = [0, 0, 20, 45, 70]
    pattern, cu_seqlens = DilatedPattern([70], [1]), torch.tensor([0, 70])
    case = Case(seq_len=70, num_heads=4, pattern=pattern, documents=(70,))
    q, k, v, dout = case.tensors(dtype=torch.float64)
    exact = dilated_attention(q, k, v, pattern, cu_seqlens=cu_seqlens)
    want = torch.autograd.grad(exact, (q, k, v), dout)
    rows = slice(bounds[dist.get_rank()], bounds[dist.get_rank() + 1])
    local = [x.detach()[rows].requires_grad_() for x in (q, k, v)]
    errors: list[float] = []
    for exchange in EXCHANGES:
        out = ring_dilated_attention(*local, pattern, cu_seqlens=cu_seqlens, exchange=exchange)
        grads = torch.autograd.grad(out, local, dout[rows])
        pairs = [(out, exact), *zip(grads, want, strict=True)]
        errors.extend(float((a - b[rows]).detach().abs().sum()) for a, b in pairs)
    return max(errors)


def test_documents_on_some_ranks() -> None:
    assert max(run_processes(documents_on_some_ranks, 4)) < 1e-9


def bits(exchange: Any) -> list[torch.Tensor]:
    """Results of two runs, in bfloat16 with dropout."""
    rank = dist.get_rank()
    rows = my_rows("zigzag", CASE.seq_len, rank, 3)
    results: list[torch.Tensor] = []
    for _ in range(2):
        torch.manual_seed(rank)
        q, k, v, dout = CASE.tensors(dtype=torch.bfloat16)
        local = [x.detach()[:, rows].requires_grad_() for x in (q, k, v)]
        out = ring_dilated_attention(
            *local, CASE.pattern, is_causal=True, layout="zigzag", exchange=exchange, dropout_p=0.3
        )
        results.extend([out.detach(), *torch.autograd.grad(out, local, dout[:, rows])])
    return results


@pytest.mark.parametrize("exchange", ["ring", "all_gather", "all_to_all"])
def test_two_runs_give_the_same_bits(exchange: str) -> None:
    for results in run_processes(bits, 3, exchange):
        for a, b in zip(results[:4], results[4:], strict=True):
            assert torch.equal(a, b)
            assert a.isfinite().all()


def given_length(exchange: Any) -> float:
    return worst_error(CASE, dist.get_rank(), 2, seq_len=70, exchange=exchange, layout="zigzag")


@pytest.mark.parametrize("exchange", ["ring", "all_to_all"])
def test_a_given_length_saves_the_comparison(exchange: str) -> None:
    assert max(run_processes(given_length, 2, exchange)) < 1e-9


def disagreements() -> list[str]:
    """The errors of each rank for calls in which rank 1 differs; a right call at the end."""
    rank = dist.get_rank()
    q, k, v, _ = CASE.tensors(dtype=torch.float32)
    other = DilatedPattern([10, 40], [1, 2])
    changes: list[dict[str, Any]] = [
        {"pattern": other},
        {"is_causal": True},
        {"q": q[:, :, :, :4]},
        {"q": q.double(), "k": k.double(), "v": v.double()},
        {"dropout_p": 1.5},
        {"exchange": "ring"},
        {"q": q.detach(), "k": k.detach(), "v": v.detach()},
    ]
    messages: list[str] = []
    for change in changes:
        arguments = {"q": q, "k": k, "v": v, "pattern": CASE.pattern}
        try:
            ring_dilated_attention(**(arguments | (change if rank == 1 else {})))
        except (ValueError, TypeError) as error:
            messages.append(f"{type(error).__name__}: {error}")
    # The group can still be used.
    messages.append(str(ring_dilated_attention(q, k, v, CASE.pattern).isfinite().all().item()))
    return messages


def test_ranks_that_disagree_raise_the_same_error() -> None:
    first, second, third = run_processes(disagreements, 3)
    words = [
        "pattern",
        "is_causal",
        "arguments is",
        "dtype",
        "arguments is",
        "exchange",
        "requires_grad",
    ]
    assert len(first) == len(words) + 1
    assert first[-1] == second[-1] == third[-1] == "True"
    for word, a, b, c in zip(words, first, second, third, strict=False):
        assert word in a
        assert "rank 1" in a
        assert a == b == c


def too_few_heads() -> list[str]:
    """Errors that every rank finds alike leave the group usable."""
    q, k, v, _ = CASE.tensors(dtype=torch.float32)
    k, v = k[:, :, :1], v[:, :, :1]
    messages: list[str] = []
    for options in ({"exchange": "all_to_all"}, {"backend": "flash2", "exchange": "ring"}, {}):
        try:
            out = ring_dilated_attention(q, k, v, CASE.pattern, **options)
            messages.append(str(out.isfinite().all().item()))
        except ValueError as error:
            messages.append(str(error))
    return messages


def test_errors_alike_on_all_ranks_leave_the_group_usable() -> None:
    for heads, backend, fine in run_processes(too_few_heads, 2):
        assert "k and v have 1 heads" in heads
        assert "flash2" in backend
        assert fine == "True"
