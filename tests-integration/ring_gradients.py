"""Attention over ranks has the results and gradients of attention over the whole sequence.

Run under torchrun (`nox -s multigpu`). Every rank holds the whole sequence and its own shard; it
compares the shard's result and gradients with those of the whole, for each layout and exchange, and
the logits of a model with those of the whole model. In float64, so that only a wrong row can make a
difference.
"""

from collections.abc import Iterator

import torch
import torch.distributed as dist
from dilated_core import DilatedPattern, dilated_attention
from dilated_models import ContextParallel, LongNetLM
from dilated_ring import ring_dilated_attention, shard_sequence
from over_ranks import run

PATTERN = DilatedPattern([16, 60, 400], [1, 3, 8])
SEQ_LEN, NUM_HEADS = 203, 8
TOLERANCE = 1e-10
"""Sums differ in their order only; a wrong row is off by 1e-3 and more."""


def compare_attention(device: torch.device, layout: str, exchange: str) -> float:
    """The largest difference on this rank."""
    torch.manual_seed(0)
    shape = (2, SEQ_LEN, NUM_HEADS, 16)
    q, k, v, upstream = (torch.randn(shape, dtype=torch.float64).to(device) for _ in range(4))
    local = [shard_sequence(x, layout=layout).requires_grad_() for x in (q, k, v)]
    out = ring_dilated_attention(*local, PATTERN, is_causal=True, layout=layout, exchange=exchange)
    got = torch.autograd.grad(out, local, shard_sequence(upstream, layout=layout))
    inputs = [x.requires_grad_() for x in (q, k, v)]
    whole = dilated_attention(*inputs, PATTERN, is_causal=True)
    want = torch.autograd.grad(whole, inputs, upstream)
    pairs = zip((out, *got), (whole, *want), strict=True)
    return max(_distance(a, shard_sequence(b, layout=layout)) for a, b in pairs)


def compare_model(device: torch.device, layout: str) -> float:
    """The largest difference of a logit on this rank."""
    torch.manual_seed(0)
    model = LongNetLM(
        num_tokens=50, d_model=64, nhead=NUM_HEADS, num_decoder_layers=2, dim_feedforward=64,
        segment_lengths=[16, 60, 400], dilation_rates=[1, 3, 8], key_conv=4, dtype=torch.float64,
    ).to(device)  # fmt: skip
    tokens = torch.randint(50, (2, SEQ_LEN)).to(device)
    logits = model(
        shard_sequence(tokens, layout=layout), context_parallel=ContextParallel(layout=layout)
    )
    return _distance(logits, shard_sequence(model(tokens), layout=layout))


def _distance(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).detach().abs().max())


def differences(device: torch.device) -> Iterator[tuple[str, float]]:
    """Of a model and of attention, for each layout and exchange."""
    exchanges = ["auto", "ring", "all_gather"]
    if dist.get_world_size() <= NUM_HEADS:  # each rank needs a head of its own
        exchanges.append("all_to_all")
    for layout in ("contiguous", "zigzag"):
        yield f"{layout}: logits", compare_model(device, layout)
        for exchange in exchanges:
            yield f"{layout}: numbers of {exchange}", compare_attention(device, layout, exchange)


if __name__ == "__main__":
    run(__doc__, differences, tolerance=TOLERANCE)
