"""A model on the shards of a sequence has the logits and gradients of the whole model."""

import dataclasses
import itertools
import sys

import pytest
import torch
import torch.distributed as dist
from dilated_core.testing.processes import run_processes
from dilated_models import ContextParallel, GenerationCache, LongNetConfig, LongNetLM
from dilated_ring import shard_sequence, unshard_sequence
from torch.distributed.device_mesh import init_device_mesh

CONFIG = LongNetConfig(
    num_tokens=61,
    d_model=32,
    nhead=4,
    num_decoder_layers=2,
    dim_feedforward=48,
    segment_lengths=(6, 16, 40),
    dilation_rates=(1, 3, 4),
)
BOUNDS = (0, 9, 9, 40, 41, 57)  # of 57 packed tokens; one document crosses a border or two


def made(**changes: object) -> LongNetLM:
    torch.manual_seed(0)
    model = LongNetLM(dataclasses.replace(CONFIG, **changes), dtype=torch.float64)
    with torch.no_grad():
        for block in model.blocks:
            if block.key_conv is not None:
                block.key_conv.weight.normal_()
    return model


def drawn(*shape: int) -> torch.Tensor:
    return torch.randint(61, shape, generator=torch.Generator().manual_seed(1))


def largest_difference(
    model: LongNetLM, tokens: torch.Tensor, layout: str, group=None, **options
) -> float:
    """Of logits, and of each parameter's gradient relative to it, on this rank."""
    dim = tokens.dim() - 1
    context_parallel = ContextParallel(layout=layout, group=group)
    local = shard_sequence(tokens, dim, layout=layout)
    logits = model(local, context_parallel=context_parallel, **options)
    whole = model(tokens, **options)
    upstream = torch.randn(whole.shape, generator=torch.Generator().manual_seed(2)).double()
    parameters = list(model.parameters())
    part = shard_sequence(upstream, dim, layout=layout)
    got = torch.autograd.grad(logits, parameters, part)
    want = torch.autograd.grad(whole, parameters, upstream)
    # On every rank each parameter has the gradient of the local tokens; the sum is the whole.
    for grad in got:
        dist.all_reduce(grad)
    scale = max(float(grad.abs().max()) for grad in want)
    gathered = unshard_sequence(logits.detach(), dim, layout=layout)
    return max(
        float((gathered - whole.detach()).abs().max()),
        *(float((a - b).abs().max()) / scale for a, b in zip(got, want, strict=True)),
    )


def models_on_shards() -> list[float]:
    rows = [
        {"positions": "xpos", "num_kv_heads": 2},
        {"positions": "rotary", "key_conv": 4, "head_offsets": "blocked", "padding": "attended"},
        {
            "positions": "alibi",
            "key_conv": 3,
            "activation_checkpointing": True,
            "num_encoder_layers": 1,
        },
    ]
    found = []
    for changes, layout in itertools.product(rows, ["contiguous", "zigzag"]):
        model = made(**changes)
        found.append(largest_difference(model, drawn(2, 45), layout))
        cu_seqlens = torch.tensor(BOUNDS)
        found.append(largest_difference(model, drawn(57), layout, cu_seqlens=cu_seqlens))
    # Fewer tokens than the convolution reaches back, and than there are ranks.
    model = made(key_conv=4)
    found += [largest_difference(model, drawn(1, n), "zigzag") for n in (1, 2, 5)]
    return found


@pytest.mark.parametrize("num_ranks", [2, 3])
def test_a_model_on_shards_equals_the_whole_model(num_ranks):
    for found in run_processes(models_on_shards, num_ranks):
        assert max(found) < 1e-10


def models_on_nodes() -> list[float]:
    """Two nodes of two ranks."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("across", "inside"))
    group = (mesh["across"], mesh["inside"])
    model = made(positions="rotary", key_conv=4)
    found = [
        largest_difference(model, drawn(2, 45), layout, group)
        for layout in ("contiguous", "zigzag")
    ]
    cu_seqlens = torch.tensor(BOUNDS)
    found.append(largest_difference(model, drawn(57), "zigzag", group, cu_seqlens=cu_seqlens))
    return found


def test_a_model_on_nodes_equals_the_whole_model():
    for found in run_processes(models_on_nodes, 4):
        assert max(found) < 1e-10


def refusals() -> list[str]:
    model, tokens = made(), drawn(1, 20)
    found = []
    for layout, local in [
        ("zigzag", tokens[:, : 8 - 2 * dist.get_rank()]),
        ("contiguous", tokens[0]),
    ]:
        with pytest.raises(ValueError) as error:
            model(local, context_parallel=ContextParallel(layout=layout))
        found.append(str(error.value))
    return found


def test_every_rank_refuses_shards_that_were_cut_otherwise():
    for cut_otherwise, one_dimension in run_processes(refusals, 2):
        assert "cut the sequence with shard_sequence" in cut_otherwise
        assert "it must be (B, S)" in one_dimension


def test_without_ranks_it_is_the_whole_model():
    model, tokens = made(key_conv=2), drawn(2, 30)
    alone = model(tokens, context_parallel=ContextParallel())
    torch.testing.assert_close(alone, model(tokens), rtol=0, atol=1e-12)


def test_what_is_no_context_parallel_is_refused():
    model, tokens = made(), drawn(1, 8)
    with pytest.raises(TypeError, match="context_parallel is a str; it must be a ContextParallel"):
        model(tokens, context_parallel="zigzag")
    with pytest.raises(ValueError, match="context_parallel and cache are both given"):
        model(tokens, cache=GenerationCache(model), context_parallel=ContextParallel())
    with pytest.raises(ValueError, match="layout"):
        ContextParallel(layout="striped")
    with pytest.raises(TypeError, match="group is a int"):
        ContextParallel(group=3)
    with pytest.raises(ValueError, match="seq_len is -1"):
        ContextParallel(seq_len=-1)


def test_a_missing_dilated_ring_is_one_sentence(monkeypatch):
    monkeypatch.setitem(sys.modules, "dilated_ring.arguments", None)
    with pytest.raises(ImportError, match=r"dilated_ring.*pip install 'dilated-models\[ring\]'"):
        ContextParallel()
