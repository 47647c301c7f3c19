"""Cross-entropy of local hidden states, with never more than a chunk of the logits in memory."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from dilated_core.checks import check_integer, check_tensor
from dilated_core.inputs import cast_for_autocast
from dilated_core.merge import accumulation_dtype
from torch.autograd.function import once_differentiable
from torch.nn.functional import linear

from dilated_ring.sharding.group import Group, resolve_group
from dilated_ring.sharding.shards import reporting, transport_of


def chunked_cross_entropy(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
    chunk_size: int = 1024,
    ignore_index: int = -100,
    group: Group = None,
    timeout_s: float | None = None,
) -> torch.Tensor:
    """This rank's share of the mean loss over all tokens of a group that have a label.

    Example::

        loss = chunked_cross_entropy(hidden_local, head.weight, labels_local)

    The share is the sum of the losses of the local tokens, divided by the number of labels of the
    whole group. The shares of all ranks add up to the mean that one process computes, and so do
    their gradients, however unevenly labels are spread. So gradients must be summed over the ranks:

    - DistributedDataParallel and FSDP divide the sum by the number N of ranks that they reduce
      over. Multiply the loss by N, or for FSDP2 call `set_gradient_divide_factor(1.0)` on each
      module that `fully_shard` has wrapped; a call does not reach the modules inside.
    - With data parallelism beside context parallelism, pass the group of all dp × cp ranks, so that
      the mean is over the batch of all of them.
    - To report the loss, add the shares: `dist.all_reduce(loss.detach())`.

    The logits of `chunk_size` tokens exist at a time, in forward and again in backward, which
    computes them a second time. Tokens without a label are skipped, whatever they hold. Losses are
    added after the last chunk, in the order of the tokens, but matrix products may round otherwise
    for another number of rows: on a CPU the loss and the gradient of hidden had the same bits for
    chunks of 64 tokens and more. The gradient of `weight` is a sum over the chunks, so its last
    bits depend on `chunk_size`.

    Args:
        hidden: `(…, D)`, local tokens. Autocast casts hidden, weight and bias as for `linear`.
        weight: `(V, D)`, of the dtype of hidden. Pass it whole: inside the forward of the module
            that FSDP wraps.
        labels: `(…)`, int64: the class of each token, see `shift_sequence`.
        bias: `(V,)`, of the dtype of hidden.
        chunk_size: Tokens whose logits are in memory at a time.
        ignore_index: The label of tokens that do not count.
        group: The ranks that share the tokens, as in `shard_sequence`.
        timeout_s: Seconds that a rank waits for another one, see
            `dilated_ring.transport.DistributedTransport`.

    Returns:
        A scalar, float32 or wider. 0 with gradients of 0 if no token of the group has a label.

    Raises:
        TypeError: If an argument has the wrong type or dtypes differ.
        ValueError: If shapes or devices do not fit, a label is no class, or this process is not in
            the group.
        RankFailure: If another rank failed or did not answer.
    """
    chunk_size = check_integer("chunk_size", chunk_size, at_least=1)
    ignore_index = check_integer("ignore_index", ignore_index)
    tensors = {"hidden": hidden, "weight": weight} | ({} if bias is None else {"bias": bias})
    for name, x in tensors.items():
        check_tensor(name, x)
    # Here, so that backward has the dtypes of forward, whether autocast is on or not.
    tensors = dict(zip(tensors, cast_for_autocast(*tensors.values()), strict=True))
    _check_inputs(tensors, labels)
    hidden = tensors["hidden"]
    ranks = resolve_group(group)
    transport = transport_of(ranks, timeout_s)
    labels = labels.flatten()
    rows = (labels != ignore_index).nonzero().squeeze(1)
    labels = labels[rows]
    with reporting(transport):
        _check_labels(labels, weight.shape[0], ignore_index)
        count = len(rows)
        if transport is not None:
            local = torch.tensor([count], device="cpu")
            count = sum(map(int, transport.all_gather(ranks.rank, local)))
    total: torch.Tensor = _LossSum.apply(  # pyright: ignore[reportAssignmentType]
        hidden.flatten(0, -2) if hidden.dim() > 1 else hidden[None],
        tensors["weight"],
        tensors.get("bias"),
        rows,
        labels,
        chunk_size,
    )
    return total / max(count, 1)


class _LossSum(torch.autograd.Function):
    """The sum of the losses of the tokens `rows` of hidden `(N, D)`."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        rows: torch.Tensor,
        labels: torch.Tensor,
        chunk_size: int,
    ) -> torch.Tensor:
        lses = hidden.new_empty(len(rows), dtype=accumulation_dtype(hidden.dtype))
        losses = torch.empty_like(lses)
        with torch.autocast(hidden.device.type, enabled=False):
            for chunk in _chunks(len(rows), chunk_size):
                logits = _logits(hidden[rows[chunk]], weight, bias)
                lses[chunk] = logits.logsumexp(1)
                losses[chunk] = lses[chunk] - logits.gather(1, labels[chunk, None]).squeeze(1)
        ctx.save_for_backward(hidden, weight, bias, rows, labels, lses)
        ctx.chunk_size = chunk_size
        return losses.sum()

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *grads: torch.Tensor
    ) -> tuple[Any, ...]:
        hidden, weight, bias, rows, labels, lses = ctx.saved_tensors
        (scale,) = grads
        needs_hidden, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        d_hidden = torch.zeros_like(hidden) if needs_hidden else None
        # Sums over the chunks, so they are wide and cast once.
        d_weight = torch.zeros_like(weight, dtype=lses.dtype) if needs_weight else None
        d_bias = torch.zeros_like(bias, dtype=lses.dtype) if needs_bias else None
        with torch.autocast(hidden.device.type, enabled=False):
            for chunk in _chunks(len(rows), ctx.chunk_size):
                h = hidden[rows[chunk]]
                d_logits = _logits(h, weight, bias).sub_(lses[chunk, None]).exp_()
                d_logits[torch.arange(len(h), device=h.device), labels[chunk]] -= 1
                if d_bias is not None:
                    d_bias += d_logits.sum(0)
                # Scaled only after the products: 1/tokens times a probability is 0 in float16.
                d_logits = d_logits.to(h.dtype)
                if d_hidden is not None:
                    d_hidden[rows[chunk]] = (d_logits @ weight).mul_(scale)
                if d_weight is None:
                    continue
                if d_weight.dtype == h.dtype:
                    d_weight.addmm_(d_logits.t(), h)
                else:
                    d_weight += d_logits.t() @ h
        d_weight = None if d_weight is None else d_weight.mul_(scale).to(weight.dtype)
        d_bias = None if d_bias is None else d_bias.mul_(scale).to(bias.dtype)
        return d_hidden, d_weight, d_bias, None, None, None


def _chunks(num_rows: int, chunk_size: int) -> Iterator[slice]:
    for begin in range(0, num_rows, chunk_size):
        yield slice(begin, min(begin + chunk_size, num_rows))


def _logits(hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """New wide logits, which may be overwritten."""
    return linear(hidden, weight, bias).to(accumulation_dtype(hidden.dtype))


def _check_inputs(tensors: dict[str, torch.Tensor], labels: torch.Tensor) -> None:
    """Check hidden, weight and perhaps bias, and the labels, but not their values."""
    hidden, weight = tensors["hidden"], tensors["weight"]
    check_tensor("labels", labels)
    for name, x in tensors.items():
        if hasattr(x, "placements"):
            raise TypeError(
                f"{name} is a DTensor; it must be a plain tensor, so call inside the forward of "
                f"the module that FSDP wraps, where parameters are whole, or pass "
                f"{name}.full_tensor()."
            )
        if x.dtype != hidden.dtype or not x.dtype.is_floating_point:
            raise TypeError(
                f"{name} has dtype {x.dtype} and hidden {hidden.dtype}; both must be one "
                f"floating-point dtype."
            )
    if labels.dtype != torch.int64:
        raise TypeError(f"labels has dtype {labels.dtype}; it must be int64.")
    for name, x in {**tensors, "labels": labels}.items():
        if x.device != hidden.device:
            raise ValueError(
                f"{name} is on {x.device} and hidden on {hidden.device}; all must be on one device."
            )
    if weight.dim() != 2 or hidden.dim() < 1 or hidden.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"hidden has shape {tuple(hidden.shape)} and weight {tuple(weight.shape)}; they must "
            f"be (…, D) and (classes, D)."
        )
    if labels.shape != hidden.shape[:-1]:
        raise ValueError(
            f"labels has shape {tuple(labels.shape)} and hidden {tuple(hidden.shape)}; each token "
            f"of hidden must have one label."
        )
    if "bias" in tensors and tensors["bias"].shape != weight.shape[:1]:
        raise ValueError(
            f"bias has shape {tuple(tensors['bias'].shape)} and weight {tuple(weight.shape)}; bias "
            f"must have one entry per class."
        )


def _check_labels(labels: torch.Tensor, num_classes: int, ignore_index: int) -> None:
    """Refuse labels of counted tokens that are no class."""
    if not len(labels):
        return
    for label in map(int, labels.aminmax()):
        if not 0 <= label < num_classes:
            raise ValueError(
                f"labels holds {label} and weight has {num_classes} rows; a label must be a class "
                f"from 0 to {num_classes - 1}, or ignore_index, here {ignore_index}."
            )
