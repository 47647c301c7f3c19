"""`attention_kind="ring"`: config and constructor tell how sequences are spread over ranks."""

import copy
import dataclasses

import pytest
import torch
import torch.distributed as dist
from dilated_core.testing.processes import run_processes
from dilated_models import ContextParallel, GenerationCache, LongNetConfig, LongNetLM
from dilated_models.longnet.saving import load_model, save_model, write_config
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
    attention_kind="ring",
    attention_options={"layout": "zigzag", "exchange": "all_gather"},
)
ALONE = dataclasses.replace(CONFIG, attention_kind="dilated", attention_options={})


def made(config: LongNetConfig, **options: object) -> LongNetLM:
    torch.manual_seed(0)
    return LongNetLM(config, dtype=torch.float64, **options)


def drawn(*shape: int) -> torch.Tensor:
    return torch.randint(61, shape, generator=torch.Generator().manual_seed(1))


def difference(model: LongNetLM, tokens: torch.Tensor, **options) -> float:
    """Of logits and gradients from those of one device, relative to the largest gradient."""
    dim = tokens.dim() - 1
    local = shard_sequence(tokens, dim, layout="zigzag")
    alone = made(ALONE)
    whole = alone(tokens, **options)
    upstream = torch.randn(whole.shape, generator=torch.Generator().manual_seed(2)).double()
    want = torch.autograd.grad(whole, list(alone.parameters()), upstream)
    logits = model(local, **options)
    part = shard_sequence(upstream, dim, layout="zigzag")
    got = torch.autograd.grad(logits, list(model.parameters()), part)
    for grad in got:
        dist.all_reduce(grad)
    scale = max(float(grad.abs().max()) for grad in want)
    gathered = unshard_sequence(logits.detach(), dim, layout="zigzag")
    return max(
        float((gathered - whole.detach()).abs().max()),
        *(float((a - b).abs().max()) / scale for a, b in zip(got, want, strict=True)),
    )


def over_ranks() -> list[float]:
    """By default over all ranks; a copy of the model has its mesh."""
    found = [
        difference(made(CONFIG), drawn(2, 45)),
        difference(made(CONFIG), drawn(57), cu_seqlens=torch.tensor([0, 9, 9, 40, 57])),
    ]
    mesh = init_device_mesh("cpu", (1, 2), mesh_dim_names=("dp", "cp"))
    model = copy.deepcopy(made(CONFIG, group=mesh["cp"]))
    local = shard_sequence(drawn(1, 22), 1, group=mesh["cp"], layout="zigzag")
    whole = made(ALONE)(drawn(1, 22))
    expected = shard_sequence(whole, 1, group=mesh["cp"], layout="zigzag")
    found.append(float((model(local) - expected).abs().max()))
    # A call may be spread in another way, and a cache continues whole texts.
    other = shard_sequence(drawn(1, 22), 1, group=mesh["cp"])
    told = model(other, context_parallel=ContextParallel(group=mesh["cp"]))
    expected = shard_sequence(whole, 1, group=mesh["cp"])
    found.append(float((told - expected).abs().max()))
    cached = model(drawn(1, 22), cache=GenerationCache(model))
    found.append(float((cached[:, 0] - whole[:, -1]).abs().max()))
    return found


def test_a_model_over_ranks_equals_the_model_of_one_device() -> None:
    for found in run_processes(over_ranks, 2):
        assert max(found) < 1e-10


def test_without_ranks_it_is_the_model_of_one_device(tmp_path) -> None:
    model, tokens = made(CONFIG).eval(), drawn(2, 30)
    torch.testing.assert_close(model(tokens), made(ALONE)(tokens), rtol=0, atol=1e-12)
    assert CONFIG.pattern == ALONE.pattern
    assert LongNetConfig.from_json(CONFIG.to_json()) == CONFIG
    write_config(tmp_path, {"model": CONFIG.to_dict(), "tokenizer": "bytes"})
    save_model(tmp_path, model.float())
    assert torch.equal(load_model(tmp_path)(tokens), model(tokens))


def test_what_cannot_be_honoured_is_refused() -> None:
    def changed(**fields: object) -> LongNetConfig:
        return dataclasses.replace(CONFIG, **fields)

    with pytest.raises(TypeError, match="'seq_len'; for attention_kind 'ring' it may hold layout"):
        changed(attention_options={"seq_len": 8})
    with pytest.raises(ValueError, match="layout is 'striped'"):
        changed(attention_options={"layout": "striped"})
    with pytest.raises(ValueError, match="exchange is 'broadcast'"):
        changed(attention_options={"exchange": "broadcast"})
    with pytest.raises(ValueError, match="timeout_s is 0"):
        changed(attention_options={"timeout_s": 0})
    with pytest.raises(ValueError, match="local_window is 4 and attention_kind 'ring'"):
        changed(local_window=4)
    with pytest.raises(TypeError, match="group is a int"):
        LongNetLM(CONFIG, group=3)
    with pytest.raises(ValueError, match="only 'ring' attention has one"):
        LongNetLM(ALONE, group=3)
