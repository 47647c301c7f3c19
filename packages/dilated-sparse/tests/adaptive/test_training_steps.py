"""Unusual steps of training: overflow, checkpointing, frozen or empty inputs."""

import pytest
import torch
from dilated_sparse import AdaptiveSparseAttention
from torch.utils.checkpoint import checkpoint


def attention(**options) -> AdaptiveSparseAttention:
    torch.manual_seed(0)
    return AdaptiveSparseAttention(num_heads=2, head_dim=8, block_size=4, topk=4, **options)


def tensors(B: int = 2, S: int = 50) -> list[torch.Tensor]:
    torch.manual_seed(1)
    return [torch.randn(B, S, 2, 8, requires_grad=True) for _ in range(3)]


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("broken", [0, 1, 2])
def test_nan_of_a_step_that_overflowed_stays_in_its_sequence(broken: int, is_causal: bool) -> None:
    leaves = tensors()
    # The backend sdpa is no witness: PyTorch's kernel for CPUs gives 0 for a row of NaN.
    module = attention(lookahead=True, backend="eager")
    expected = module(*leaves, is_causal)[1]
    with torch.no_grad():
        leaves[broken][0, 20] = torch.nan
    # The row's own block is always kept, so the NaN reaches the output, where a scaler finds it.
    out = module(*leaves, is_causal)
    assert out[0, 20].isnan().any()
    assert torch.equal(out[1], expected)
    if is_causal:
        assert not out[0, :20].isnan().any()
    out.sum().backward()
    assert leaves[0].grad[0].isnan().any()
    assert not leaves[0].grad[1].isnan().any()


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing_draws_what_forward_drew(use_reentrant: bool) -> None:
    module, leaves = attention(dropout=0.3), tensors()
    parameters = [*leaves, *module.parameters()]

    def layer(*x: torch.Tensor) -> torch.Tensor:
        # Dropout behind the attention: what that draws decides on the numbers of this one.
        return torch.nn.functional.dropout(module(*x, is_causal=True), 0.5)

    torch.manual_seed(2)
    plain = layer(*leaves)
    expected = torch.autograd.grad(plain.square().sum(), parameters)
    torch.manual_seed(2)
    saved = checkpoint(layer, *leaves, use_reentrant=use_reentrant)
    assert torch.equal(saved, plain)
    saved.square().sum().backward()
    for x, wanted in zip(parameters, expected, strict=True):
        assert torch.equal(x.grad, wanted)


def test_the_gate_learns_where_all_else_is_frozen() -> None:
    q, k, v = (x.detach() for x in tensors())
    module = attention(distillation="all")
    module(q, k, v, is_causal=True).sum().backward()
    wanted = torch.autograd.grad(module.distillation_loss(q, k, True), list(module.parameters()))
    assert all(map(torch.equal, (x.grad for x in module.parameters()), wanted))
    module.requires_grad_(False)
    assert not module(q, k, v, is_causal=True).requires_grad


@pytest.mark.parametrize("options", [{}, {"gate_gradient": "bias", "distillation": "none"}])
@pytest.mark.parametrize(("B", "S"), [(0, 5), (2, 0), (2, 3)])
def test_every_parameter_has_a_gradient_at_any_length(B: int, S: int, options: dict) -> None:
    """As distributed training expects, which waits for the gradient of each."""
    module, leaves = attention(**options), tensors(B, S)
    packed = [x.flatten(0, 1) for x in leaves]
    bounds = torch.tensor([0, 0, B * S])
    outs = [module(*leaves, is_causal=True), module(*packed, is_causal=True, cu_seqlens=bounds)]
    for out, inputs in zip(outs, (leaves, packed), strict=True):
        assert out.shape == inputs[0].shape
        wanted = [*inputs, *module.parameters()]
        for grad, x in zip(torch.autograd.grad(out.sum(), wanted), wanted, strict=True):
            assert grad.shape == x.shape
            assert grad.isfinite().all()
