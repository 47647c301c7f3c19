"""Block-sparse attention over ranks of one process equals dense attention under the mask."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from block_cases import CASES, BlockCase, block_cases, dense
from dilated_core.testing.error_budget import relative_error
from dilated_ring import ring_block_sparse_attention_with_lse, simulated_ring_block_sparse_attention
from dilated_sparse import (
    BlockSparseAttention,
    SparsePatternConfig,
    block_sparse_attention,
    local_window,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

EXCHANGES = ["ring", "all_gather", "all_to_all", "auto"]
LAYOUTS = ["contiguous", "zigzag"]


def compare(case: BlockCase, ring_size: int, layout: str, exchange: str, **options: Any) -> None:
    """Out and every gradient against the oracle."""
    if exchange == "all_to_all" and case.num_kv_heads < ring_size:
        exchange = "auto"
    q, k, v, dout = case.tensors()
    exact, _ = dense(case, q, k, v)
    want = torch.autograd.grad(exact, (q, k, v), dout)
    out = simulated_ring_block_sparse_attention(
        q, k, v, case.pattern, case.block_size, ring_size=ring_size, layout=layout,
        exchange=exchange, **case.options(), **options,
    )  # fmt: skip
    got = torch.autograd.grad(out, (q, k, v), dout)
    for a, b in zip((out, *got), (exact, *want), strict=True):
        assert (a - b).abs().max() < 1e-9


@pytest.mark.parametrize("number", range(len(CASES)))
def test_awkward_cases(number: int) -> None:
    case = CASES[number]
    compare(case, 1 + number % 4, LAYOUTS[number % 2], EXCHANGES[number % 4])
    compare(case, 8, LAYOUTS[1 - number % 2], EXCHANGES[(number + 3) % 4])


@pytest.mark.exhaustive
@pytest.mark.parametrize("exchange", EXCHANGES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", CASES)
def test_all_awkward_cases(case: BlockCase, layout: str, exchange: str) -> None:
    for ring_size in (1, 2, 3, 4, 8):
        compare(case, ring_size, layout, exchange)


@settings(deadline=None, max_examples=25, suppress_health_check=[HealthCheck.differing_executors])
@given(
    case=block_cases(),
    ring_size=st.integers(1, 9),
    layout=st.sampled_from(LAYOUTS),
    exchange=st.sampled_from(EXCHANGES),
    backend=st.sampled_from(["eager", "sdpa"]),
    sizes=st.sampled_from([(2**21, 4096), (64, 5)]),
)
def test_random_cases(
    case: BlockCase,
    ring_size: int,
    layout: str,
    exchange: str,
    backend: str,
    sizes: tuple[int, int],
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        # Problems are cut as those of long sequences are.
        patch.setattr("dilated_ring.plan.block_tiles._GATHERED_BYTES", {"cpu": sizes[0]})
        patch.setattr("dilated_ring.plan.block_tiles._MOST_QUERIES", sizes[1])
        compare(case, ring_size, layout, exchange, backend=backend)


def test_lse_and_its_gradient() -> None:
    case = BlockCase(37, pattern_name="sinks", is_causal=True, num_kv_heads=2)
    q, k, v, dout = case.tensors()
    dlse = dout.sum(-1)
    exact = dense(case, q, k, v)
    got = ring_block_sparse_attention_with_lse(q, k, v, case.pattern, 4, is_causal=True)
    torch.testing.assert_close(got.lse, exact[1])
    want = torch.autograd.grad(exact, (q, k, v), (dout, dlse))
    for a, b in zip(torch.autograd.grad(got, (q, k, v), (dout, dlse)), want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("exchange", EXCHANGES)
def test_some_of_the_heads(exchange: str) -> None:
    """Heads 4 to 9 of 12, with the lists that they have among the 12."""
    case = BlockCase(40, pattern_name="per head", num_heads=12, num_kv_heads=6)
    q, k, v, _ = (x.detach() for x in case.tensors())
    whole, _ = dense(case, q, k, v)
    some = simulated_ring_block_sparse_attention(
        q[:, :, 4:10], k[:, :, 2:5], v[:, :, 2:5], case.pattern, 4, ring_size=3,
        head_range=(4, 12), exchange=exchange,
    )  # fmt: skip
    torch.testing.assert_close(some, whole[:, :, 4:10])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_does_not_get_worse_with_ranks(dtype: torch.dtype) -> None:
    case = BlockCase(150, block_size=8, pattern_name="coarse", num_kv_heads=2)
    exact, _ = dense(case, *(x.to(dtype).double() for x in case.tensors()[:3]))
    q, k, v, _ = (x.detach() for x in case.tensors(dtype))
    one = block_sparse_attention(q, k, v, case.pattern, 8)
    many = simulated_ring_block_sparse_attention(q, k, v, case.pattern, 8, ring_size=8)
    assert relative_error(many, exact) <= 2 * relative_error(one, exact)


@pytest.mark.parametrize("number", [2, 4, 6, 7, 8, 10, 11])
def test_dropout_is_that_of_one_device(number: int) -> None:
    case = replace(CASES[number], masked=None)
    q, k, v, dout = case.tensors()
    options = {"is_causal": case.is_causal, "cu_seqlens": case.options()["cu_seqlens"]}
    options |= {"dropout_p": 0.4}
    torch.manual_seed(5)
    whole = block_sparse_attention(q, k, v, case.pattern, case.block_size, **options)
    want = [whole, *torch.autograd.grad(whole, (q, k, v), dout)]
    for exchange in ("ring", "all_to_all" if case.num_kv_heads > 2 else "all_gather"):
        torch.manual_seed(5)
        out = simulated_ring_block_sparse_attention(
            q, k, v, case.pattern, case.block_size, ring_size=3, layout=LAYOUTS[number % 2],
            exchange=exchange, **options,
        )  # fmt: skip
        got = [out, *torch.autograd.grad(out, (q, k, v), dout)]
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


class MyBlocks:
    """A pattern of blocks that is not of dilated_sparse."""

    num_blocks = 5
    num_heads = 1

    def __init__(self, *rows: list[int]) -> None:
        self._rows = rows or ([0], [0, 1], [1, 2], [0, 3], [2, 3, 4])

    def rows(self) -> list[Any]:
        return [self._rows]


def test_any_pattern_with_the_same_methods() -> None:
    q = k = v = torch.randn(1, 19, 2, 8)
    from_rows = type(local_window(1, window=0)).from_rows(MyBlocks().rows()[0])
    out = simulated_ring_block_sparse_attention(q, k, v, MyBlocks(), 4, ring_size=3)
    torch.testing.assert_close(out, block_sparse_attention(q, k, v, from_rows, 4))


@pytest.mark.parametrize("kind", ["whole", "documents", "masked"])
def test_a_config_gives_each_document_the_pattern_of_its_length(kind: str) -> None:
    q = k = v = torch.randn(70, 2, 8)
    options: dict[str, Any] = {"is_causal": True}
    if kind == "documents":
        options["cu_seqlens"] = torch.tensor([0, 48, 70])
    else:
        q = k = v = q.unsqueeze(0)
    if kind == "masked":
        options["key_padding_mask"] = torch.zeros(1, 70, dtype=torch.bool)
        options["key_padding_mask"][:, 20:60] = True
    config = SparsePatternConfig(pattern_type="local_window", sparsity_ratio=0.4, block_size=8)
    one = BlockSparseAttention(pattern_type="local_window", sparsity_ratio=0.4, block_size=8)
    out = simulated_ring_block_sparse_attention(q, k, v, config, ring_size=3, **options)
    torch.testing.assert_close(out, one(q, k, v, **options))


def test_padding_that_would_shift_blocks_is_refused() -> None:
    q = k = v = torch.randn(2, 20, 2, 8)
    first, last, right = torch.zeros(3, 2, 20, dtype=torch.bool).unbind()
    first[1, 0] = last[0, 19] = True
    right[0, 13:] = right[1] = True  # a padded sequence, and one that is padding alone
    pattern, config = local_window(5, window=1), SparsePatternConfig(block_size=4)
    for mask, blocks, message in [
        (first, pattern, "hides the first position of a batch row"),
        (last, config, "hides the last position of a batch row, and the pattern follows"),
    ]:
        with pytest.raises(ValueError, match=message):
            simulated_ring_block_sparse_attention(
                q, k, v, blocks, 4, ring_size=2, key_padding_mask=mask
            )
    out = simulated_ring_block_sparse_attention(
        q, k, v, pattern, 4, ring_size=2, key_padding_mask=right
    )
    one = block_sparse_attention(q, k, v, pattern, 4, key_padding_mask=right)
    torch.testing.assert_close(out, one)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"pattern": local_window(4, window=0)}, ValueError, "the pattern has 4 blocks; 20 posi"),
        ({"pattern": "window"}, TypeError, "pattern is a str; it must be a DilatedPattern for"),
        ({"pattern": MyBlocks}, TypeError, "pattern is a type"),
        ({"pattern": MyBlocks([0], [1], [2])}, ValueError, "num_blocks 5, num_heads 1 and 3 rows"),
        ({"pattern": MyBlocks([0], [], [2], [3], [4])}, ValueError, "row 1 of the pattern keeps"),
        ({"pattern": MyBlocks([0], [1, 1], [2], [3], [4])}, ValueError, "does not ascend"),
        ({"pattern": MyBlocks([0], [1, 5], [2], [3], [4])}, ValueError, "outside of 0 to 4"),
        (
            {"pattern": MyBlocks([0], [2], [2], [3], [4]), "is_causal": True},
            ValueError,
            "row 1 of the pattern keeps only blocks above the diagonal, and attention is causal",
        ),
        ({"block_size": 0}, ValueError, "block_size is 0; it must be at least 1"),
        ({"block_size": 4.0}, TypeError, "block_size is 4.0; it must be an integer"),
        ({"pattern": SparsePatternConfig(block_size=8)}, ValueError, "pattern is for blocks of 8"),
        ({"head_range": (0, 5)}, ValueError, "the pattern lists 2 heads and there are 5"),
        ({"exchange": "all_to_all", "ring_size": 3}, ValueError, "k and v have 2 heads"),
        ({"ring_size": 0}, ValueError, "ring_size is 0"),
        ({"layout": "zig"}, ValueError, "layout is 'zig'"),
    ],
)
def test_wrong_arguments(change: dict[str, Any], error: type[Exception], message: str) -> None:
    q = k = v = torch.randn(1, 20, 2, 8)
    pattern = type(local_window(1, window=0)).per_head([local_window(5, window=1)] * 2)
    arguments = {"pattern": pattern, "block_size": 4, "ring_size": 2}
    with pytest.raises(error, match=message):
        simulated_ring_block_sparse_attention(q, k, v, **(arguments | change))


def test_a_document_that_a_row_keeps_nothing_of() -> None:
    q = k = v = torch.randn(30, 2, 8)
    pattern = type(local_window(1, window=0)).from_rows([[4], [1], [2], [3], [4]])
    with pytest.raises(ValueError, match="row 0 of the pattern keeps only blocks behind the 3 of"):
        simulated_ring_block_sparse_attention(
            q, k, v, pattern, 4, ring_size=2, cu_seqlens=torch.tensor([0, 20, 30])
        )
    with pytest.raises(ValueError, match="the longest document has 25 positions"):
        simulated_ring_block_sparse_attention(
            q, k, v, pattern, 4, ring_size=2, cu_seqlens=torch.tensor([0, 25, 30])
        )


def test_no_batch_rows_and_no_positions() -> None:
    for shape in ((0, 20, 2, 8), (2, 0, 2, 8)):
        q = torch.randn(shape, requires_grad=True)
        pattern = local_window(5 if shape[1] else 1, window=1)
        out = simulated_ring_block_sparse_attention(q, q, q, pattern, 4, ring_size=3)
        out.sum().backward()
        assert out.shape == q.shape == q.grad.shape


def test_the_same_plan_serves_other_calls() -> None:
    """Plans are kept by call: another length of document must not meet the tiles of this one."""
    case = BlockCase(48, documents=(24, 24), pattern_name="window")
    for documents in ((24, 24), (20, 28), (28, 20)):
        compare(replace(case, documents=documents), 3, "contiguous", "ring")
