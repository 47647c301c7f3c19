"""Multi-head ring modules equal one device: results, gradients of all parameters, errors."""

from typing import Any

import pytest
import torch
import torch.distributed as dist
from dilated_core import (
    DilatedPattern,
    MultiheadDilatedAttention,
    create_dilated_attention,
    create_multihead_dilated_attention,
    dilated_attention,
    rotate,
    rotation_at,
    with_alibi,
)
from dilated_core.testing.processes import run_processes
from dilated_ring import (
    DistributedRingAttention,
    HilbertRingAttention,
    RingAttentionConfig,
    RingMultiheadDilatedAttention,
    StandardRingAttention,
    local_positions,
    shard_sequence,
    shift_sequence,
)
from torch import nn

OPTIONS: dict[str, Any] = {
    "embed_dim": 24,
    "num_heads": 6,
    "num_kv_heads": 2,
    "segment_lengths": [10, 40, 70],
    "dilation_rates": [1, 2, 3],
    "dtype": torch.float64,
}
S = 67
KINDS = ["standard", "distributed", "hilbert"]


def attend_with(mha: MultiheadDilatedAttention, x: torch.Tensor, positions: Any) -> torch.Tensor:
    """With xPos at the given positions, between `project` and `attend`."""
    q, k, v = mha.project(x, x, x)
    rotation = rotation_at(positions, mha.head_dim, dtype=torch.float64)
    q = rotate(q, rotation.q_cos, rotation.q_sin)
    k = rotate(k, rotation.k_cos, rotation.k_sin)
    return mha.combine(mha.attend(q, k, v, is_causal=True))


def multihead(kind: str, layout: Any) -> float:
    """The largest distance from one device, of results and summed gradients."""
    torch.manual_seed(0)
    whole = MultiheadDilatedAttention(**OPTIONS)
    tile_size = 16 if kind == "hilbert" else None
    ring = RingMultiheadDilatedAttention(
        **OPTIONS, kind=kind, layout=layout, tile_size=tile_size, ring_size=dist.get_world_size()
    )
    ring.load_state_dict(whole.state_dict())
    x = torch.randn(2, S, 24, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(2, S, 24, dtype=torch.float64)
    mask = torch.rand(2, S) < 0.2
    local = [shard_sequence(t, 1, layout=layout) for t in (x, weight, mask)]
    mine = local[0].detach().requires_grad_()
    rows = local_positions(layout, S)
    wants = [whole(x, x, x, key_padding_mask=mask), attend_with(whole, x, torch.arange(S))]
    pair = ring(mine, mine, mine, key_padding_mask=local[2], need_weights=False)
    assert pair[1] is None
    gots = [pair[0], attend_with(ring, mine, rows)]
    errors: list[float] = []
    for want, got in zip(wants, gots, strict=True):
        errors.append(float((got - want[:, rows]).detach().abs().max()))
        dx, *exact = torch.autograd.grad((want * weight).sum(), [x, *whole.parameters()])
        dmine, *grads = torch.autograd.grad((got * local[1]).sum(), [mine, *ring.parameters()])
        errors.append(float((dmine - dx[:, rows]).abs().max()))
        for grad, expected in zip(grads, exact, strict=True):
            dist.all_reduce(grad)
            errors.append(float((grad - expected).abs().max()))
    return max(errors)


@pytest.mark.parametrize(
    ("kind", "layout", "num_processes"),
    [("standard", "zigzag", 3), ("distributed", "contiguous", 2), ("hilbert", "zigzag", 2)],
)
def test_several_processes_equal_one(kind: str, layout: str, num_processes: int) -> None:
    assert max(run_processes(multihead, num_processes, kind, layout)) < 1e-9


def alibi(layout: Any) -> float:
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 1, S, 4, 8, dtype=torch.float64).unbind()
    pattern = DilatedPattern([10, 40, 70], [1, 2, 3])
    *whole, scale = with_alibi(q, k, v, torch.arange(S))
    want = dilated_attention(*whole, pattern, is_causal=True, scale=scale)
    rows = local_positions(layout, S)
    *local, scale = with_alibi(q[:, rows], k[:, rows], v[:, rows], rows)
    ring = StandardRingAttention([10, 40, 70], [1, 2, 3], layout=layout, scale=scale)
    return float((ring(*local, is_causal=True) - want[:, rows]).abs().max())


def checks_and_hooks() -> list[str]:
    """Errors that all ranks raise, and what hooks see."""
    rank = dist.get_rank()
    messages: list[str] = []
    ring = DistributedRingAttention([10, 40], [1, 2], timeout_s=20)
    x = torch.randn(1, 20, 4, 8, requires_grad=True)
    bad = x.detach().clone()
    if rank == 1:
        bad[0, 3, 2, :4] = torch.inf
    calls: list[Any] = [
        lambda: ring(x, bad, x),
        lambda: ring(x, x, x, is_causal=rank == 0),
        lambda: ring("no tensor" if rank else x, x, x),
        lambda: StandardRingAttention([10], [1], ring_size=4),
        lambda: StandardRingAttention([10], [1], ring_size=1),
        lambda: StandardRingAttention([10], [1], group=dist.new_group([0])),
    ]
    for call in calls:
        try:
            call()
            messages.append("")
        except (FloatingPointError, ValueError, TypeError) as error:
            messages.append(f"{type(error).__name__}: {error}")
    seen: list[str] = []
    ring.register_forward_pre_hook(lambda _, args: seen.append(f"inputs {args[0].shape[1]}"))
    ring.register_forward_hook(lambda _, args, out: seen.append(f"output {out.shape[1]}"))
    ring.register_full_backward_pre_hook(lambda _, dout: seen.append(f"dout {dout[0].shape[1]}"))
    ring.register_full_backward_hook(
        lambda _, grads, dout: seen.append(f"gradients {len(grads)} {grads[0].shape[1]}")
    )
    ring(x, x * 1, x * 1).sum().backward()
    assert x.grad is not None
    assert alibi("zigzag") < 1e-6
    return [*messages, ", ".join(seen)]


def test_checks_raise_on_all_ranks_and_hooks_see_local_tensors() -> None:
    first, second = run_processes(checks_and_hooks, 2)
    message = (
        "FloatingPointError: k is not finite in 4 places on rank 1. Every rank raises this, so "
        "all can skip the step, or stop."
    )
    assert first[0] == second[0] == message
    assert first[1] == second[1]
    assert "is_causal is True on rank 0; False on rank 1" in first[1]
    assert "TypeError: q is a str" in first[2]
    assert "TypeError: q is a str" in second[2]
    for messages in (first, second):
        assert messages[3] == (
            "ValueError: ring_size is 4 and the group has 2 ranks; leave out ring_size, or pass a "
            "group of that size."
        )
        assert "ring_size is 1 and the group has 2 ranks" in messages[4]
        assert messages[6] == "inputs 20, output 20, dout 20, gradients 3 20"
    assert first[5] == ""
    assert "group does not include this process, rank 1" in second[5]


class Block(nn.Module):
    """A model with the ring inside, for `torch.compile`."""

    def __init__(self) -> None:
        super().__init__()
        self.mha = RingMultiheadDilatedAttention(**OPTIONS, ring_size=2, check_health=True)
        self.out = nn.Linear(24, 24, dtype=torch.float64)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + shift_sequence(x, -1, fill=0)
        return self.out(torch.relu(self.mha(x, x, x, is_causal=True) + x)).sum(-1)


def compiled() -> float:
    """The largest distance of gradients of a compiled model from those of the plain one."""
    torch.manual_seed(0)
    model = Block()
    x = torch.randn(2, S, 24, dtype=torch.float64)
    if dist.is_initialized():
        x = shard_sequence(x, 1)
    faster = torch.compile(model, backend="eager")
    want = torch.autograd.grad(model(x).square().sum(), list(model.parameters()))
    got = torch.autograd.grad(faster(x).square().sum(), list(model.parameters()))
    return max(float((a - b).abs().max()) for a, b in zip(got, want, strict=True))


# torch.compile reads .grad of every tensor that it takes up behind a graph break.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_a_compiled_model_has_the_same_gradients() -> None:
    assert compiled() < 1e-9


@pytest.mark.exhaustive
def test_a_compiled_model_has_the_same_gradients_on_several_ranks() -> None:
    assert max(run_processes(compiled, 2)) < 1e-9


@pytest.mark.parametrize("kind", KINDS)
def test_one_process_equals_one_device(kind: str) -> None:
    whole = MultiheadDilatedAttention(**OPTIONS)
    ring = RingMultiheadDilatedAttention(**OPTIONS, kind=kind, ring_size=3)
    assert list(ring.state_dict()) == list(whole.state_dict())
    ring.load_state_dict(whole.state_dict())
    x = torch.randn(2, S, 24, dtype=torch.float64)
    for is_causal in (False, True):
        want = whole(x, x, x, is_causal=is_causal)
        torch.testing.assert_close(ring(x, x, x, is_causal=is_causal), want)
    flat, bounds = x.flatten(0, 1), torch.tensor([0, 20, 100, 2 * S])
    torch.testing.assert_close(
        ring(flat, flat, flat, cu_seqlens=bounds), whole(flat, flat, flat, cu_seqlens=bounds)
    )


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("ring", StandardRingAttention),
        ("distributed", DistributedRingAttention),
        ("ring_distributed", DistributedRingAttention),
        ("ring_hilbert", HilbertRingAttention),
    ],
)
def test_factory_names_of_core(name: str, expected: type[nn.Module]) -> None:
    mha = create_multihead_dilated_attention(
        name,
        embed_dim=48,
        num_heads=12,
        segment_lengths=[16, 32],
        dilation_rates=[1, 2],
        ring_size=8,
    )
    assert type(mha) is RingMultiheadDilatedAttention
    assert type(mha.attention) is expected
    standard = create_multihead_dilated_attention(
        "standard", embed_dim=48, num_heads=12, segment_lengths=[16, 32], dilation_rates=[1, 2]
    )
    mha.load_state_dict(standard.state_dict())
    x = torch.randn(1, 100, 48)
    torch.testing.assert_close(mha(x, x, x), standard(x, x, x))
    config = RingAttentionConfig(segment_lengths=[8], dilation_rates=[1], layout="zigzag")
    attention = create_dilated_attention(name, attention_config=config, ring_size=2)
    assert type(attention) is expected
    assert attention.config.layout == "zigzag"


def test_in_an_encoder_layer_of_pytorch() -> None:
    layer = nn.TransformerEncoderLayer(24, 6, 32, dropout=0, batch_first=True)
    layer.self_attn = RingMultiheadDilatedAttention.from_multihead_attention(
        layer.self_attn, segment_lengths=[70], dilation_rates=[1], ring_size=3
    )
    dense = nn.TransformerEncoderLayer(24, 6, 32, dropout=0, batch_first=True)
    ring_weights = layer.state_dict()
    state = dense.state_dict()
    state.update({n: w for n, w in ring_weights.items() if not n.startswith("self_attn")})
    q, k, v = (ring_weights[f"self_attn.{n}_proj.weight"] for n in "qkv")
    biases = [ring_weights[f"self_attn.{n}_proj.bias"] for n in "qkv"]
    state["self_attn.in_proj_weight"] = torch.cat([q, k, v])
    state["self_attn.in_proj_bias"] = torch.cat(biases)
    for name in ("weight", "bias"):
        state[f"self_attn.out_proj.{name}"] = ring_weights[f"self_attn.out_proj.{name}"]
    dense.load_state_dict(state)
    x = torch.randn(2, 50, 24)
    torch.testing.assert_close(layer(x), dense(x), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "round"}, "kind is 'round'; it must be one of 'auto', 'standard'"),
        ({"max_workspace_bytes": 9}, "max_workspace_bytes is 9; a ring has no such limit"),
        ({"num_heads": 5}, "num_kv_heads must divide num_heads"),
    ],
)
def test_wrong_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RingMultiheadDilatedAttention(**(OPTIONS | options))
