"""What users do around a call: checkpoints, two backward passes, other default devices."""

import pytest
import torch
import torch.distributed as dist
from dilated_core import AttentionOutput, DilatedPattern, dilated_attention_with_lse
from dilated_core.testing.cases import Case
from dilated_core.testing.processes import run_processes
from dilated_ring import ring_dilated_attention, ring_dilated_attention_with_lse
from torch.utils.checkpoint import checkpoint

PATTERN = DilatedPattern([10, 40, 70], [1, 2, 3])
CASE = Case(seq_len=70, num_heads=4, pattern=PATTERN)
EXCHANGES = ["ring", "all_gather", "all_to_all"]

# The gradients of out and of lse.
Upstream = tuple[torch.Tensor, torch.Tensor]


def my_half() -> slice:
    return slice(35) if dist.get_rank() == 0 else slice(35, 70)


def of_one_device(dout: torch.Tensor, dlse: torch.Tensor) -> list[torch.Tensor]:
    """This rank's part of the gradients of q, k and v."""
    q, k, v, _ = CASE.tensors(dtype=torch.float64)
    whole = dilated_attention_with_lse(q, k, v, PATTERN)
    grads = torch.autograd.grad(whole, (q, k, v), (dout, dlse))
    return [grad[:, my_half()] for grad in grads]


def upstream() -> Upstream:
    *_, dout = CASE.tensors(dtype=torch.float64)
    dlse = torch.linspace(-1, 1, 70 * 4, dtype=torch.float64).view(1, 70, 4)
    return dout, dlse


def shards() -> list[torch.Tensor]:
    q, k, v, _ = CASE.tensors(dtype=torch.float64)
    return [x.detach()[:, my_half()].clone().requires_grad_() for x in (q, k, v)]


def worst(got: list[torch.Tensor], want: list[torch.Tensor]) -> float:
    return max(float((a - b).abs().max()) for a, b in zip(got, want, strict=True))


def checkpoints(exchange: str) -> list[float]:
    """The call is the last operation in the checkpoint, or one of several."""
    dout, dlse = upstream()
    errors: list[float] = []

    def call(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> AttentionOutput:
        return ring_dilated_attention_with_lse(q, k, v, PATTERN, exchange=exchange)

    def scaled(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Upstream:
        out, lse = call(q, k, v)
        return (2 * out).square().sqrt() * out.sign() / 2, lse * 1

    for function in (call, scaled):
        for use_reentrant in (True, False):
            x = shards()
            out, lse = checkpoint(function, *x, use_reentrant=use_reentrant)
            torch.autograd.backward((out, lse), (dout[:, my_half()], dlse[:, my_half()]))
            errors.append(worst([t.grad for t in x], of_one_device(dout, dlse)))
    return errors


@pytest.mark.parametrize("exchange", EXCHANGES)
def test_activation_checkpoints_recompute_the_call(exchange: str) -> None:
    assert max(max(errors) for errors in run_processes(checkpoints, 2, exchange)) < 1e-9


def on_another_default_device() -> list[str]:
    x = shards()
    with torch.device("meta"):
        out = ring_dilated_attention(*x, PATTERN)
        try:
            ring_dilated_attention(*x, PATTERN, is_causal=dist.get_rank() == 1)
        except ValueError as error:
            return [str(out.device), str(error)]
    return [str(out.device)]


def test_the_default_device_does_not_matter() -> None:
    for device, message in run_processes(on_another_default_device, 2):
        assert device == "cpu"
        assert "is_causal is False on rank 0; True on rank 1" in message


def unlike_losses(exchange: str) -> list[float]:
    """Each rank has another tensor without a gradient, and another result in its loss."""
    rank, rows = dist.get_rank(), my_half()
    dout, dlse = upstream()
    x = shards()
    x[rank].requires_grad_(False)
    out = ring_dilated_attention(*x, PATTERN, exchange=exchange)
    differentiated = [t for t in x if t.requires_grad]
    got = torch.autograd.grad(out, differentiated, dout[:, rows])
    want = of_one_device(dout, torch.zeros_like(dlse))
    errors = [worst(list(got), [g for t, g in zip(x, want, strict=True) if t.requires_grad])]
    # Out on rank 0 alone, lse on rank 1 alone.
    dout[:, 35:], dlse[:, :35] = 0, 0
    out, lse = ring_dilated_attention_with_lse(*(x := shards()), PATTERN, exchange=exchange)
    loss = (out * dout[:, rows]).sum() if rank == 0 else (lse * dlse[:, rows]).sum()
    errors.append(worst(list(torch.autograd.grad(loss, x)), of_one_device(dout, dlse)))
    return errors


@pytest.mark.parametrize("exchange", EXCHANGES)
def test_ranks_may_differentiate_other_tensors(exchange: str) -> None:
    assert max(max(errors) for errors in run_processes(unlike_losses, 2, exchange)) < 1e-9
