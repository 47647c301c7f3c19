"""Block-sparse attention over real ranks, each a process: results, gradients, bytes, errors."""

from typing import Any

import dilated_ring.execution.attend
import dilated_ring.over_ranks
import pytest
import torch
import torch.distributed as dist
from block_cases import CASES, BlockCase, dense
from dilated_core.testing.processes import run_processes
from dilated_ring import (
    RingBlockSparseAttention,
    exchange_plan,
    ring_block_sparse_attention,
    ring_block_sparse_attention_with_lse,
)
from dilated_ring.layout import spans_of_ranks
from dilated_ring.transport import DistributedTransport
from dilated_sparse import (
    BlockPattern,
    SparsePatternConfig,
    block_sparse_attention_with_lse,
    hierarchical,
    local_window,
)
from torch.distributed.device_mesh import init_device_mesh

LAYOUTS: list[Any] = ["contiguous", "zigzag"]
EXCHANGES: list[Any] = ["ring", "all_gather", "all_to_all", "auto"]


def my_rows(layout: Any, seq_len: int, rank: int, size: int) -> torch.Tensor:
    spans = spans_of_ranks(layout, seq_len, size)[rank]
    return torch.tensor([i for span in spans for i in range(*span)], dtype=torch.int64)


def worst_error(case: BlockCase, rows: torch.Tensor, **options: Any) -> float:
    """Distance of this rank's results and gradients from the oracle and from one device."""
    q, k, v, dout = case.tensors()
    call = case.options()
    exact = dense(case, q, k, v)
    one = block_sparse_attention_with_lse(q, k, v, case.pattern, case.block_size, **call)
    sees = exact[1] > -torch.inf
    dlse = torch.linspace(-1, 1, sees.numel(), dtype=torch.float64).view(sees.shape)
    dlse = dlse.masked_fill(~sees, 0)
    finite = exact[0], exact[1].masked_fill(~sees, 0)
    want = torch.autograd.grad(finite, (q, k, v), (dout, dlse))
    dim = 0 if case.documents else 1
    local = [x.detach().index_select(dim, rows).requires_grad_() for x in (q, k, v)]
    if call["key_padding_mask"] is not None:
        call["key_padding_mask"] = call["key_padding_mask"][:, rows]
    got = ring_block_sparse_attention_with_lse(
        *local, case.pattern, case.block_size, **call, **options
    )
    grads = torch.autograd.grad(
        got, local, (dout.index_select(dim, rows), dlse.index_select(dim, rows))
    )
    errors: list[float] = []
    pairs = [(got.out, exact[0]), (got.out, one.out), *zip(grads, want, strict=True)]
    for a, b in pairs:
        errors.append(float((a - b.index_select(dim, rows)).detach().abs().sum()))
    for lse in (exact[1], one.lse):
        lse = lse.detach().index_select(dim, rows)
        assert torch.equal(got.lse == -torch.inf, lse == -torch.inf)
        errors.append(float((got.lse.detach() - lse).nan_to_num(0).abs().sum()))
    return max(errors)


def compare_all() -> float:
    rank, size = dist.get_rank(), dist.get_world_size()
    errors = [0.0]
    for number, case in enumerate(CASES):
        exchange, layout = EXCHANGES[number % 4], LAYOUTS[number // 2 % 2]
        if exchange == "all_to_all" and case.num_kv_heads < size:
            exchange = "ring"
        rows = my_rows(layout, case.seq_len, rank, size)
        errors.append(worst_error(case, rows, layout=layout, exchange=exchange))
    return max(errors)


@pytest.mark.parametrize("num_processes", [2, 3, 4])
def test_awkward_cases(num_processes: int) -> None:
    assert max(run_processes(compare_all, num_processes)) < 1e-9


CASE = BlockCase(70, block_size=8, pattern_name="coarse", num_kv_heads=2, is_causal=True)


def uneven_shards_and_groups() -> float:
    """Borders inside blocks, a rank with nothing, several ranks in a block, a sub-group."""
    rank = dist.get_rank()
    bounds = [0, 33, 33, 35, 70]
    rows = torch.arange(bounds[rank], bounds[rank + 1])
    errors = [worst_error(CASE, rows, exchange=exchange) for exchange in ("ring", "all_gather")]
    pair = dist.new_group([2, 0]), dist.new_group([1, 3])
    group = pair[rank % 2]
    rows = my_rows("zigzag", 70, dist.get_rank(group), 2)
    errors.append(worst_error(CASE, rows, group=group, layout="zigzag", seq_len=70))
    return max(errors)


def test_uneven_shards_and_groups() -> None:
    assert max(run_processes(uneven_shards_and_groups, 4)) < 1e-9


class Recorded(DistributedTransport):
    """Counts the bytes of each group."""

    made: list["Recorded"] = []  # noqa: RUF012

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        Recorded.made.append(self)


def two_nodes() -> list[float]:
    """Two nodes of two ranks: heads inside, blocks of a hierarchy across; (sent, planned)."""
    rank = dist.get_rank()
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("across", "inside"))
    group = (mesh["across"], mesh["inside"])
    rows = my_rows("contiguous", 70, rank, 4)
    error = worst_error(CASE, rows, group=group, exchange="ring")
    error = max(error, worst_error(CASES[7], my_rows("zigzag", 45, rank, 4), group=group,
                                   layout="zigzag"))  # fmt: skip
    dilated_ring.over_ranks.DistributedTransport = Recorded
    seq_len, size = 2048, 16
    pattern = hierarchical(seq_len // size)
    q, k, v = torch.randn(3, 1, seq_len // 4, 4, 8).unbind()
    ring_block_sparse_attention(q, k, v, pattern, size, group=group, exchange="ring")
    _near, far = Recorded.made
    # Across, a node is one rank, and each of its ranks sends half of the heads.
    plan = exchange_plan(
        pattern, seq_len, 2, block_size=size, exchange="ring", num_heads=2, head_dim=8, dtype=4
    )
    return [error, far.sent_bytes, plan.ranks[rank // 2].forward_bytes, plan.share_of_gathering]


def test_a_hierarchy_across_nodes_sends_few_blocks() -> None:
    for error, sent, planned, share in run_processes(two_nodes, 4):
        assert error < 1e-9
        assert sent == planned
        assert 0 < share < 0.3


def bytes_of_ranks() -> list[tuple[list[int], list[int]]]:
    """(bytes sent, bytes planned) by this rank, forward and backward."""
    dilated_ring.over_ranks.DistributedTransport = Recorded
    rank, size = dist.get_rank(), dist.get_world_size()
    counted: list[tuple[list[int], list[int]]] = []
    for number in (2, 3, 5, 7, 10):
        case = CASES[number]
        for exchange in EXCHANGES:
            if exchange == "all_to_all" and case.num_kv_heads < size:
                continue
            layout, call = LAYOUTS[number % 2], case.options()
            rows = my_rows(layout, case.seq_len, rank, size)
            q, k, v, dout = (
                x.detach().index_select(0 if case.documents else 1, rows)
                for x in case.tensors(torch.float32)
            )
            q, k, v = (x.requires_grad_() for x in (q, k, v))
            if (mask := call["key_padding_mask"]) is not None:
                call["key_padding_mask"] = mask[:, rows]
            plan = exchange_plan(
                case.pattern, case.seq_len, size, layout, block_size=case.block_size,
                exchange=exchange, num_heads=case.num_heads, num_kv_heads=case.num_kv_heads,
                head_dim=8, dtype=torch.float32, batch_size=case.batch_size,
                is_causal=case.is_causal, cu_seqlens=call["cu_seqlens"],
                has_key_padding_mask=mask is not None,
            )  # fmt: skip
            Recorded.made.clear()
            out = ring_block_sparse_attention(
                q, k, v, case.pattern, case.block_size, layout=layout, exchange=exchange, **call
            )
            forward = sum(x.sent_bytes for x in Recorded.made)
            out.backward(dout)
            backward = sum(x.sent_bytes for x in Recorded.made) - forward
            planned = plan.ranks[rank]
            counted.append(([forward, backward], [planned.forward_bytes, planned.backward_bytes]))
    return counted


@pytest.mark.parametrize("num_processes", [2, 3])
def test_ranks_send_what_the_plan_says(num_processes: int) -> None:
    for counted in run_processes(bytes_of_ranks, num_processes):
        assert len(counted) >= 15
        for sent, planned in counted:
            assert sent == planned


def mistakes() -> list[str]:
    """The errors of each rank for calls in which rank 1 differs; a right call at the end."""
    rank = dist.get_rank()
    q, k, v, _ = (x.detach() for x in CASE.tensors())
    # As many blocks in each row, but others.
    others = BlockPattern.from_rows([[0, 2], *local_window(27, window=1).rows()[0][1:]])
    changes: list[dict[str, Any]] = [
        {"pattern": others},
        {"block_size": 9},
        {"pattern": SparsePatternConfig(block_size=8, sparsity_ratio=0.5)},
        {"pattern": "window"},
    ]
    messages: list[str] = []
    for change in changes:
        arguments = {"pattern": local_window(27, window=1), "block_size": 8}
        try:
            ring_block_sparse_attention(q, k, v, **(arguments | (change if rank == 1 else {})))
        except (ValueError, TypeError) as error:
            messages.append(f"{type(error).__name__}: {error}")
    for pattern, options in [(local_window(5, window=1), {}), (local_window(27, window=1), {})]:
        try:
            out = ring_block_sparse_attention(q, k, v, pattern, 8, **options)
            messages.append(str(out.isfinite().all().item()))
        except ValueError as error:
            messages.append(str(error))
    return messages


def test_mistakes_raise_the_same_error_on_all_ranks() -> None:
    first, second, third = run_processes(mistakes, 3)
    assert first == second == third
    *differ, other_length, right = first
    for message, word in zip(differ, ["pattern is", "block_size=8", "pattern is", "arguments is"],
                             strict=True):  # fmt: skip
        assert message.startswith("DisagreementError: The ranks of the group differ")
        assert word in message
        assert "rank 1" in message
    assert other_length.startswith("the pattern has 5 blocks; 210 positions of all ranks")
    assert right == "True"


def a_rank_that_fails() -> str:
    """Rank 1 runs out of memory in the middle of a call, before it passes blocks on."""
    x, group = torch.randn(1, 20, 4, 8), dist.new_group()
    if dist.get_rank() == 1:

        def fail(*_: Any) -> Any:
            raise MemoryError("no memory for tiles")

        dilated_ring.execution.attend.local_tasks = fail
    try:
        ring_block_sparse_attention(
            x, x, x, local_window(15, window=14), 4, exchange="ring", timeout_s=20, group=group
        )
    except (RuntimeError, MemoryError) as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


def test_a_rank_that_fails_is_named_on_the_others() -> None:
    first, second, third = run_processes(a_rank_that_fails, 3)
    assert second == "MemoryError: no memory for tiles"
    for message in (first, third):
        assert message.startswith("RankFailure: rank 1 failed: MemoryError: no memory for tiles")


def module_over_ranks() -> float:
    rank, size = dist.get_rank(), dist.get_world_size()
    config = SparsePatternConfig(pattern_type="global_local", sparsity_ratio=0.4, block_size=8)
    ring = RingBlockSparseAttention(config, layout="zigzag", ring_size=size, check_health=True)
    case = BlockCase(70, block_size=8, num_kv_heads=2, is_causal=True)
    q, k, v, _ = (x.detach() for x in case.tensors())
    pattern = config.pattern_for(70, is_causal=True)
    want = block_sparse_attention_with_lse(q, k, v, pattern, 8, is_causal=True).out
    rows = my_rows("zigzag", 70, rank, size)
    got = ring(*(x[:, rows] for x in (q, k, v)), is_causal=True)
    return float((got - want[:, rows]).abs().max())


def test_the_module() -> None:
    assert max(run_processes(module_over_ranks, 2)) < 1e-12
