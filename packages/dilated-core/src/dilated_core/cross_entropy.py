"""Cross-entropy over a vocabulary, with the logits of one chunk of tokens in memory at a time.

Logits, not attention, run out of memory first: 262,144 tokens and 32,768 classes are 34 GB in
float32, and whole cross-entropy holds three tensors of that size. Here each chunk of tokens runs
forward and backward before the next one begins. So forward computes the loss and its gradients, and
backward only multiplies these.

The size of a chunk depends on the number of classes alone, never on the number of tokens, the
memory or the device. So the order in which anything is added is fixed by the inputs.

PyTorch 2.15 has `torch.nn.functional.linear_cross_entropy`. It is not used here: the packages also
run on PyTorch 2.11; the bits of its gradients depend on a chunk size that it chooses from the
number of tokens; and its chunked form is no operator for `torch.compile`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch.autograd.function import once_differentiable
from torch.nn.functional import cross_entropy, linear, log_softmax, nll_loss

from dilated_core.checks import check_choice, check_integer, check_tensor
from dilated_core.dispatch import is_plain, is_transformed
from dilated_core.flops import register_formulas
from dilated_core.inputs import cast_for_autocast
from dilated_core.merge import accumulation_dtype

_ATEN: Any = torch.ops.aten
_LOGITS = 1 << 25  # in a chunk: 128 MiB of float32
_FEWEST_TOKENS = 1 << 10  # below, adding a chunk to the gradient of weight outweighs its product


def linear_cross_entropy(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    count: int | torch.Tensor | None = None,
) -> torch.Tensor:
    """`cross_entropy(linear(hidden, weight, bias), labels)` without the logits of all tokens.

    Example::

        loss = linear_cross_entropy(hidden, head.weight, labels)          # the mean
        loss = linear_cross_entropy(hidden, head.weight, labels, count=n)  # the sum, divided by n

    The logits of `chunk_tokens(classes)` tokens exist at a time, and their softmax is computed in
    float32. What is equal to the computation with whole logits:

    - The loss, and the gradient of hidden for an upstream gradient of 1, have the same bits where
      the matrix product of some rows has the bits that these rows have in the product of all, as
      on CPUs; elsewhere they differ in rounding. (With `reduction="none"`, for any upstream
      gradient.)
    - The gradients of weight and bias are sums over the chunks in the order of the tokens, in
      float32. With one chunk they are those of whole logits; with more they differ in rounding.

    Tokens without a label are skipped, whatever they hold. For `"mean"` and `"sum"`, forward
    computes the gradients too. So an activation checkpoint around the loss computes them twice;
    put it around the layers below.

    Args:
        hidden: `(…, D)`. Autocast casts hidden, weight and bias as for `linear`.
        weight: `(classes, D)`, of the dtype of hidden.
        labels: `(…)`, int64: the class of each token. On a GPU, labels that are no class are
            found by PyTorch's kernels.
        bias: `(classes,)`, of the dtype of hidden.
        ignore_index: The label of tokens that do not count.
        reduction: `"mean"` over the tokens with a label, `"sum"`, or `"none"`.
        count: What the mean divides by, instead of the number of labels here: the number in all
            parts of a batch, or on all ranks. An int, or a scalar tensor that needs no gradient.

    Returns:
        A scalar, float32 or wider; for `"none"` the losses `(…)`, 0 without a label. The mean of
        no label is 0 with gradients of 0.

    Raises:
        TypeError: If an argument has the wrong type, or dtypes differ.
        ValueError: If shapes or devices do not fit, or a label on the CPU is no class.
    """
    ignore_index = check_integer("ignore_index", ignore_index)
    check_choice("reduction", reduction, ("mean", "sum", "none"))
    if count is not None:
        if reduction != "mean":
            raise ValueError(
                f'count is given with reduction="{reduction}"; only "mean" divides by it, so leave '
                f"it out."
            )
        if not isinstance(count, torch.Tensor):
            count = check_integer("count", count, at_least=0)
    hidden, weight, bias = check_arguments(hidden, weight, labels, bias)
    shape = labels.shape
    hidden, labels = hidden.reshape(-1, hidden.shape[-1]), labels.reshape(-1)
    if is_plain(labels):
        check_labels(labels, weight.shape[0], ignore_index)
    counted = labels != ignore_index
    divisor = None
    if reduction == "mean":
        divisor = counted.sum() if count is None else torch.as_tensor(count, device=hidden.device)
        divisor = divisor.clamp(min=1).to(accumulation_dtype(hidden.dtype))
    if not torch.compiler.is_compiling() and is_transformed(hidden, weight, labels):
        return _whole(hidden, weight, bias, labels, divisor, ignore_index, reduction, shape)
    if reduction == "none":
        losses: Any = _Each.apply(hidden, weight, bias, labels, ignore_index)
        return losses.view(shape)
    total: Any = _Total.apply(hidden, weight, bias, labels, divisor, ignore_index)
    return total


def chunk_tokens(num_classes: int) -> int:
    """Number of tokens whose logits `linear_cross_entropy` holds at a time.

    Example:
        >>> chunk_tokens(256), chunk_tokens(32_768), chunk_tokens(128_256)
        (131072, 1024, 1024)
    """
    return max(_FEWEST_TOKENS, 1 << (_LOGITS // max(1, num_classes)).bit_length() - 1)


def check_arguments(
    hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, bias: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Hidden, weight and bias as autocast casts them; nothing is checked about values of labels.

    Raises:
        TypeError: If an argument has the wrong type, or dtypes differ.
        ValueError: If shapes or devices do not fit.
    """
    tensors = {"hidden": hidden, "weight": weight} | ({} if bias is None else {"bias": bias})
    for name, x in {**tensors, "labels": labels}.items():
        check_tensor(name, x)
    # Here, so that the gradients have the dtypes of the leaves.
    tensors = dict(zip(tensors, cast_for_autocast(*tensors.values()), strict=True))
    hidden, weight, bias = tensors["hidden"], tensors["weight"], tensors.get("bias")
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
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(
            f"bias has shape {tuple(bias.shape)} and weight {tuple(weight.shape)}; bias "
            f"must have one entry per class."
        )
    return hidden, weight, bias


def check_labels(labels: torch.Tensor, num_classes: int, ignore_index: int) -> None:
    """Refuse labels on the CPU that are no class; a GPU would have to wait for the answer.

    Raises:
        ValueError: If there is one.
    """
    if labels.device.type != "cpu" or not labels.numel():
        return
    counted = labels[labels != ignore_index]
    for label in map(int, counted.aminmax() if counted.numel() else ()):
        if not 0 <= label < num_classes:
            raise ValueError(
                f"labels holds {label} and weight has {num_classes} rows; a label must be a class "
                f"from 0 to {num_classes - 1}, or ignore_index, here {ignore_index}."
            )


class _Total(torch.autograd.Function):
    """The sum of the losses, divided by the divisor; its gradients are computed in forward."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        labels: torch.Tensor,
        divisor: torch.Tensor | None,
        ignore_index: int,
    ) -> torch.Tensor:
        wants = list(ctx.needs_input_grad[:3])
        scales = None
        if any(wants):
            scales = (labels != ignore_index).to(accumulation_dtype(hidden.dtype))
            scales = scales if divisor is None else scales / divisor
        losses, *grads = _run(hidden, weight, bias, labels, scales, ignore_index, wants)
        ctx.dtypes = [hidden.dtype, weight.dtype, None if bias is None else bias.dtype]
        ctx.wants = wants
        ctx.save_for_backward(*grads)
        total = _sum(losses, labels, ignore_index)
        return total if divisor is None else total / divisor

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, grad: torch.Tensor
    ) -> tuple[Any, ...]:
        results = [
            (saved * grad).to(dtype) if wanted else None
            for saved, dtype, wanted in zip(ctx.saved_tensors, ctx.dtypes, ctx.wants, strict=True)
        ]
        return (*results, None, None, None)


class _Each(torch.autograd.Function):
    """The loss of each token; backward computes the logits a second time."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        labels: torch.Tensor,
        ignore_index: int,
    ) -> torch.Tensor:
        ctx.save_for_backward(hidden, weight, bias, labels)
        ctx.ignore_index = ignore_index
        return _run(hidden, weight, bias, labels, None, ignore_index, [False] * 3)[0]

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, grad: torch.Tensor
    ) -> tuple[Any, ...]:
        hidden, weight, bias, labels = ctx.saved_tensors
        wants = list(ctx.needs_input_grad[:3])
        scales = grad.masked_fill(labels == ctx.ignore_index, 0)
        _, *grads = _run(hidden, weight, bias, labels, scales, ctx.ignore_index, wants)
        results = [
            result.to(like.dtype) if wanted else None
            for result, like, wanted in zip(grads, (hidden, weight, bias), wants, strict=True)
        ]
        return (*results, None, None)


def _run(hidden: torch.Tensor, weight: torch.Tensor, *rest: Any) -> tuple[torch.Tensor, ...]:
    """`_chunked`, where needed as an operator."""
    if is_plain(hidden, weight):
        return _chunked(hidden, weight, *rest)
    if not torch.compiler.is_compiling():
        register_formulas()
    return _operator(hidden, weight, *rest)


def _chunked(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    labels: torch.Tensor,
    scales: torch.Tensor | None,
    ignore_index: int,
    wants: list[bool],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """The losses `(N,)`, and gradients of Σ scale · loss; empty where none is wanted."""
    wide = accumulation_dtype(hidden.dtype)
    losses = hidden.new_empty(len(labels), dtype=wide)
    d_hidden, d_weight, d_bias = _results(hidden, weight, wants)
    largest = None
    if scales is not None and len(scales) and hidden.dtype == torch.float16:
        # 1/tokens times a probability is 0 in float16, so scales are 1 at most until the end.
        largest = scales.abs().amax().clamp(min=torch.finfo(wide).tiny)
        scales = scales / largest
    with torch.no_grad(), torch.autocast(hidden.device.type, enabled=False):
        for chunk in _chunks(len(labels), chunk_tokens(weight.shape[0])):
            y = labels[chunk]
            ignored = y == ignore_index
            h = hidden[chunk].masked_fill(ignored[:, None], 0)
            logits = linear(h, weight, bias)
            wide_logits = logits.to(wide)
            log_p = log_softmax(wide_logits, 1)
            losses[chunk] = nll_loss(log_p, y, ignore_index=ignore_index, reduction="none")
            if scales is None:
                continue
            # As the backward of log_softmax and nll_loss, in memory that is no longer read.
            upstream = wide_logits.zero_()
            upstream.scatter_(1, y.masked_fill(ignored, 0)[:, None], -scales[chunk, None])
            d_logits = _ATEN._log_softmax_backward_data(upstream, log_p, 1, wide).to(h.dtype)
            if wants[0]:
                d_hidden[chunk] = d_logits @ weight
            if wants[1]:
                _add_product(d_weight, d_logits.t(), h)
            if wants[2]:
                d_bias += d_logits.sum(0, dtype=wide)
    if largest is not None:
        for x in (d_hidden, d_weight, d_bias):
            x.mul_(largest)
    return losses, d_hidden, d_weight, d_bias


def _results(
    hidden: torch.Tensor, weight: torch.Tensor, wants: list[bool]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Memory for the gradients. What is summed over chunks is wide, and cast once."""
    wide = accumulation_dtype(hidden.dtype)
    held = wide if hidden.dtype == torch.float16 else hidden.dtype  # not scaled yet
    return (
        hidden.new_empty(hidden.shape if wants[0] else (0,), dtype=held),
        weight.new_zeros(weight.shape if wants[1] else (0,), dtype=wide),
        weight.new_zeros(weight.shape[:1] if wants[2] else (0,), dtype=wide),
    )


def _chunks(num_tokens: int, size: int) -> Iterator[slice]:
    """Chunks of `size` tokens; the last has size/2 to 3·size/2, as few rows round otherwise."""
    begin = 0
    while num_tokens - begin >= size + size // 2:
        yield slice(begin, begin + size)
        begin += size
    if begin < num_tokens:
        yield slice(begin, num_tokens)


def _add_product(total: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> None:
    """Add a @ b to a wide total, without rounding the product to 16 bits."""
    if a.dtype == total.dtype:
        total.addmm_(a, b)
    elif a.device.type == "cuda":
        total += torch.mm(a, b, out_dtype=total.dtype)
    else:
        total.addmm_(a.to(total.dtype), b.to(total.dtype))


def _sum(losses: torch.Tensor, labels: torch.Tensor, ignore_index: int) -> torch.Tensor:
    """The sum in the order in which cross_entropy adds the losses of whole logits."""
    targets = torch.where(labels == ignore_index, -100, 0)
    return nll_loss(-losses[:, None], targets, reduction="sum")


def _whole(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    labels: torch.Tensor,
    divisor: torch.Tensor | None,
    ignore_index: int,
    reduction: str,
    shape: torch.Size,
) -> torch.Tensor:
    """The loss from whole logits, for transforms of torch.func and forward mode."""
    logits = linear(hidden, weight, bias).to(accumulation_dtype(hidden.dtype))
    kind = "none" if reduction == "none" else "sum"
    loss = cross_entropy(logits, labels, ignore_index=ignore_index, reduction=kind)
    if divisor is not None:
        return loss / divisor
    return loss.view(shape) if reduction == "none" else loss


_operator = torch.library.custom_op(
    "dilated_core::cross_entropy_chunks",
    _chunked,
    mutates_args=(),
    schema=(
        "(Tensor hidden, Tensor weight, Tensor? bias, Tensor labels, Tensor? scales, "
        "int ignore_index, bool[] wants) -> (Tensor, Tensor, Tensor, Tensor)"
    ),
)


@_operator.register_fake
def _(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    labels: torch.Tensor,
    scales: torch.Tensor | None,
    ignore_index: int,
    wants: list[bool],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    losses = hidden.new_empty(labels.shape, dtype=accumulation_dtype(hidden.dtype))
    return losses, *_results(hidden, weight, wants)
