"""Dropout over ranks: what one device drops, forward and backward."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from dilated_core import DilatedPattern, dilated_attention
from dilated_core.testing.processes import run_processes
from dilated_ring import local_positions, ring_dilated_attention, simulated_ring_attention
from hypothesis import given, settings
from hypothesis import strategies as st

PATTERN = DilatedPattern([12, 30], [1, 2])


def results(attend: Any, tensors: list[torch.Tensor], dout: torch.Tensor) -> list[torch.Tensor]:
    torch.manual_seed(5)
    out = attend(*tensors)
    return [out, *torch.autograd.grad(out, tensors, dout)]


def close(got: list[torch.Tensor], want: list[torch.Tensor]) -> None:
    for a, e in zip(got, want, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-9, atol=1e-11)


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 60),
    st.integers(1, 5),
    st.sampled_from([(4, 4), (6, 2), (3, 1)]),
    st.lists(st.tuples(st.integers(1, 70), st.integers(1, 5)), min_size=1, max_size=3),
    st.booleans(),
    st.sampled_from(["contiguous", "zigzag"]),
    st.sampled_from(["ring", "all_gather", "all_to_all"]),
    st.sampled_from(["whole", "documents", "masked", "tiles"]),
    st.integers(0, 2**32),
)
def test_ranks_drop_what_one_device_drops(
    seq_len, ring_size, heads, branches, is_causal, layout, exchange, kind, seed
):
    generator = torch.Generator().manual_seed(seed)
    if exchange == "all_to_all" and (heads[1] < ring_size or kind == "tiles"):
        exchange = "auto"
    shape = (seq_len,) if kind == "documents" else (2, seq_len)
    tensors = [
        torch.randn(*shape, h, 4, dtype=torch.float64, generator=generator)
        for h in (heads[0], heads[1], heads[1])
    ]
    dout = torch.randn(tensors[0].shape, dtype=torch.float64, generator=generator)
    tensors = [x.requires_grad_() for x in tensors]
    options: dict[str, Any] = {"is_causal": is_causal, "dropout_p": 0.4}
    if kind == "documents":
        cuts = torch.randint(0, seq_len + 1, (3,), generator=generator).tolist()
        options["cu_seqlens"] = torch.tensor(sorted([0, *cuts, seq_len]))
    if kind == "masked":
        options["key_padding_mask"] = torch.rand(2, seq_len, generator=generator) < 0.3
    pattern = DilatedPattern(*zip(*branches, strict=True))
    over_ranks = {"ring_size": ring_size, "layout": layout, "exchange": exchange}
    if kind == "tiles":
        over_ranks["tile_size"] = 8
    want = results(
        lambda *x: dilated_attention(*x, pattern, **options, backend="eager"), tensors, dout
    )
    close(
        results(
            lambda *x: simulated_ring_attention(*x, pattern, **options, **over_ranks),
            tensors,
            dout,
        ),
        want,
    )


def on_a_rank(exchange: Any, seq_len: int | None) -> float:
    """The largest error of this rank, whose generator has a seed of its own."""
    rank = dist.get_rank()
    generator = torch.Generator().manual_seed(0)
    q, k, v, dout = torch.randn(4, 1, 50, 4, 4, dtype=torch.float64, generator=generator).unbind()
    rows = local_positions("zigzag", 50)
    options: dict[str, Any] = {"is_causal": True, "dropout_p": 0.5}

    def all_results(attend: Any, tensors: list[torch.Tensor], dout: torch.Tensor, seed: int) -> Any:
        tensors = [x.detach().clone().requires_grad_() for x in tensors]
        torch.manual_seed(seed)
        out = attend(*tensors)
        return [out, *torch.autograd.grad(out, tensors, dout)]

    want = all_results(lambda *x: dilated_attention(*x, PATTERN, **options), [q, k, v], dout, 0)
    got = all_results(
        lambda *x: ring_dilated_attention(
            *x, PATTERN, **options, layout="zigzag", exchange=exchange, seq_len=seq_len
        ),
        [x[:, rows] for x in (q, k, v)],
        dout[:, rows],
        rank,
    )
    return max((a - e[:, rows]).abs().max().item() for a, e in zip(got, want, strict=True))


@pytest.mark.parametrize(("exchange", "seq_len"), [("ring", None), ("all_to_all", 50)])
def test_processes_with_other_seeds_drop_what_one_device_drops(exchange, seq_len):
    assert max(run_processes(on_a_rank, 3, exchange, seq_len)) < 1e-9
