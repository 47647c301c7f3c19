"""Top-k compression of gradients with error feedback, for DistributedDataParallel."""

# No `from __future__ import annotations`: register_comm_hook compares the annotations of a hook
# with classes, and refuses strings.

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.distributed as dist
from torch.distributed import GradBucket  # pyright: ignore[reportPrivateImportUsage]
from torch.nn.parallel import DistributedDataParallel

from dilated_ring.gradients.checks import (
    check_arguments,
    check_errors,
    check_same_on_all_ranks,
    errors_of_rank,
)

# Indices travel as int32.
_MAX_ELEMENTS = 2**31 - 1


class TopKCompression:
    """The state of `topk_hook`, which sends only the largest elements of each gradient.

    Example:
        >>> store = dist.HashStore()  # torchrun needs none: dist.init_process_group()
        >>> dist.init_process_group("gloo", store=store, rank=0, world_size=1)
        >>> model = DistributedDataParallel(torch.nn.Linear(300, 100))
        >>> compression = TopKCompression(model, ratio=0.01)
        >>> model.register_comm_hook(compression, topk_hook)
        >>> model(torch.ones(1, 300)).sum().backward()  # from here on, train as before
        >>> model.module.weight.grad.count_nonzero()
        tensor(300)
        >>> dist.destroy_process_group()

    In each backward pass every rank adds its error to its gradient, and sends the `ratio` of the
    elements of each parameter that are largest in absolute value, at least one. Each rank chooses
    elements of its own. The new gradient is the sum of what all ranks sent, divided by the number
    of ranks: the mean, as in plain DistributedDataParallel. What a rank did not send stays in its
    error and goes into its next gradient ("error feedback"). No part of a gradient is lost, it
    arrives later. Stich et al., "Sparsified SGD with Memory" (arXiv 1809.07599), prove that SGD
    converges this way at the rate of plain SGD. `error_feedback=False` drops what is not sent;
    training then may never converge.

    **When it helps.** All ranks receive the selections of all others, so the bytes per rank grow
    with the number of ranks, while those of an all-reduce do not. Float32 gradients: an element
    costs 8 bytes (value and index), and compression sends less than an all-reduce while
    `ratio * number of ranks < 1`. Bfloat16: 6 bytes, `ratio * number of ranks < 2/3`. The network
    must be slow as well: the selection reads every gradient several times. For half the bytes
    without a change of the training, use PyTorch's `fp16_compress_hook` or `bf16_compress_hook`;
    for low-rank compression over an all-reduce, PyTorch's `powerSGD_hook` (all three in
    `torch.distributed.algorithms.ddp_comm_hooks`).

    **Messages.** DistributedDataParallel collects gradients into buckets of `bucket_cap_mb` (25 by
    default). A bucket of more than `max_tensors` parameters is sent in several messages, so that
    the first one is on its way while the elements of the next are selected. The hook starts every
    message itself, in an order that is the same on all ranks, and returns a future. Elements are
    selected per parameter, not per bucket: DistributedDataParallel rebuilds its buckets after the
    first iteration, and neither the result nor the errors depend on buckets.

    **Ratio 1.0** is a plain all-reduce: the same bits as DistributedDataParallel without a hook.

    **Values that are not finite.** A NaN or an infinity in a gradient arrives on every rank. If
    it fills all places that a rank may send of a parameter, the whole gradient of that parameter
    becomes NaN. The errors of that parameter stay as they were before this backward pass.

    **Loss scaling.** Errors are in the unit of the gradients. After a `GradScaler` changes its
    scale, call `compression.scale_errors(new_scale / old_scale)`.

    **Unused parameters.** With `find_unused_parameters=True`, the errors of a parameter wait while
    its gradient is zero on this rank: DistributedDataParallel discards what ranks send for a
    parameter that no rank uses.

    **Saving.** Each rank has errors of its own, and saves and loads its own `state_dict()`. Keys
    contain the rank, so that `torch.distributed.checkpoint` keeps the errors of all ranks apart.
    Training continues with the same bits. A state loads only on the number of ranks that saved it.
    To continue on another number, start without the saved errors; only gradients that were not
    sent yet are lost.

    Args:
        ddp: The wrapped model. Its process group, any subset of the ranks, is the one that is used.
            All ranks of the group must create their `TopKCompression` together: arguments are
            compared between ranks.
        ratio: Which part of each parameter's elements a rank sends, above 0 and at most 1.
        max_tensors: The most parameters in a message.
        error_feedback: Whether elements that are not sent are kept for the next iteration. The
            errors take as much memory as float32 gradients.

    Attributes:
        sent_bytes: Bytes that this rank has sent so far, when each rank passes its message on
            around a ring: bytes of the message, times the other ranks.
        all_reduce_bytes: Bytes that plain ring all-reduces of the same gradients would have sent:
            bytes of the gradients, times 2 * (ranks - 1) / ranks.

    Raises:
        TypeError: For arguments of the wrong type.
        ValueError: For a ratio outside (0, 1], `max_tensors` below 1, arguments that differ
            between ranks, or a parameter of 2**31 elements or more.
    """

    def __init__(
        self,
        ddp: DistributedDataParallel,
        *,
        ratio: float = 0.01,
        max_tensors: int = 32,
        error_feedback: bool = True,
    ) -> None:
        check_arguments(ddp, ratio, max_tensors, error_feedback)
        self.ratio = float(ratio)
        self.max_tensors = max_tensors
        self.error_feedback = error_feedback
        self.sent_bytes = 0
        self.all_reduce_bytes = 0
        self._group = cast(dist.ProcessGroup, ddp.process_group)
        self._may_be_unused = bool(ddp.find_unused_parameters)
        ignored = cast(set[str], ddp.parameters_to_ignore)
        self._parameters = {
            name: parameter
            for name, parameter in cast(torch.nn.Module, ddp.module).named_parameters()
            if parameter.requires_grad and name not in ignored
        }
        for name, parameter in self._parameters.items():
            if parameter.numel() > _MAX_ELEMENTS:
                raise ValueError(
                    f"Parameter {name} has {parameter.numel()} elements, but indices are sent as "
                    f"int32, for at most {_MAX_ELEMENTS} elements. Split the parameter."
                )
        self._names = {parameter: name for name, parameter in self._parameters.items()}
        # By name, flat in the order of the parameter's elements. A missing error is zero.
        self._errors: dict[str, torch.Tensor] = {}
        check_same_on_all_ranks(
            {"ratio": self.ratio, "max_tensors": max_tensors, "error_feedback": error_feedback},
            self._group,
        )

    def state_dict(self) -> dict[str, Any]:
        """A copy of this rank's errors: `{"world_size": n, "rank_0": {name: error}}`.

        Each error is shaped as its parameter, float32 (float64 for float64 parameters), and zero
        before the first backward pass.
        """
        errors = {
            name: self._error(name).reshape(parameter.shape).clone()
            for name, parameter in self._parameters.items()
        }
        return {"world_size": self._group.size(), self._rank_key: errors}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Replace the errors by those that `state_dict()` returned on the same rank.

        Raises:
            TypeError: If `state_dict` is no dict, or an error is no tensor.
            ValueError: If it comes from another rank or number of ranks, or if names, shapes or
                dtypes differ from the model's. The errors then stay as they were.
        """
        errors = errors_of_rank(state_dict, self._rank_key, self._group.size())
        expected = {
            name: torch.empty(p.shape, dtype=_error_dtype(p.dtype), device="meta")
            for name, p in self._parameters.items()
        }
        check_errors(errors, expected)
        for name, parameter in self._parameters.items():
            self._errors[name] = errors[name].to(parameter.device, copy=True).reshape(-1)

    def scale_errors(self, factor: float) -> None:
        """Multiply the errors, after the scale of the loss changed by `factor`.

        Raises:
            ValueError: If `factor` is not finite and above 0.
        """
        if not (math.isfinite(factor) and factor > 0):
            raise ValueError(f"factor must be finite and above 0, not {factor}.")
        for error in self._errors.values():
            error.mul_(factor)

    @property
    def _rank_key(self) -> str:
        return f"rank_{self._group.rank()}"

    def _error(self, name: str) -> torch.Tensor:
        parameter = self._parameters[name]
        if name not in self._errors:
            dtype = _error_dtype(parameter.dtype)
            return torch.zeros(parameter.numel(), dtype=dtype, device=parameter.device)
        return self._errors[name]

    def _reduce(self, bucket: GradBucket) -> torch.futures.Future[torch.Tensor]:
        buffer = bucket.buffer()
        if buffer.layout != torch.strided:
            raise ValueError(
                f"topk_hook got a gradient of layout {buffer.layout}, but selects elements of "
                "dense gradients. Create the embedding with sparse=False."
            )
        size = self._group.size()
        named = list(zip(self._names_of(bucket), bucket.gradients(), strict=True))
        all_reduce_bytes = 2 * (size - 1) * buffer.nbytes // size
        self.all_reduce_bytes += all_reduce_bytes
        if self.ratio == 1.0:
            self.sent_bytes += all_reduce_bytes
            for name, gradient in named:
                if name in self._errors:  # loaded from a run with a smaller ratio
                    gradient += self._errors.pop(name).view_as(gradient)
            # As DistributedDataParallel does it: a division by 3 would give other bits.
            buffer.mul_(1 / size)
            return _future(dist.all_reduce(buffer, group=self._group, async_op=True)).then(
                lambda _: buffer
            )

        # All messages start here, in the order of the bucket. Messages that start in a callback
        # start in another order on each rank: ranks then exchange different parameters, or hang.
        messages: list[_Message] = []
        arrivals: list[torch.futures.Future[Any]] = []
        for part in _parts(named, self.max_tensors):
            message, payload = self._select(part)
            gathered = payload.new_empty(size * payload.numel())
            work = dist.all_gather_into_tensor(gathered, payload, group=self._group, async_op=True)
            self.sent_bytes += (size - 1) * payload.nbytes
            messages.append(message)
            arrivals.append(_future(work).then(lambda _, gathered=gathered: gathered))

        def combine(
            done: torch.futures.Future[list[torch.futures.Future[Any]]],
        ) -> torch.Tensor:
            for message, arrival in zip(messages, done.value(), strict=True):
                message.combine(arrival.wait().view(size, -1))
            return buffer

        return torch.futures.collect_all(arrivals).then(combine)

    def _names_of(self, bucket: GradBucket) -> list[str]:
        try:
            return [self._names[cast(torch.nn.Parameter, p)] for p in bucket.parameters()]
        except KeyError:
            raise ValueError(
                "topk_hook got a parameter that the model of its TopKCompression does not have. "
                "Register the hook with the model that TopKCompression was created with."
            ) from None

    def _select(self, part: list[tuple[str, torch.Tensor]]) -> tuple["_Message", torch.Tensor]:
        """Choose what is sent of each gradient, and keep the rest in the errors."""
        indices: list[torch.Tensor] = []
        values: list[torch.Tensor] = []
        start = 0
        for name, gradient in part:
            error = self._error(name)
            rest = error + gradient.reshape(-1)
            chosen = rest.abs().topk(self._count(gradient), sorted=False).indices
            value = rest[chosen].to(gradient.dtype)
            if self._may_be_unused:
                value = torch.where(gradient.count_nonzero() > 0, value, 0)
            if self.error_feedback:
                rest[chosen] -= value  # with the rounding error of a 16-bit value
                # topk puts NaN and infinities first, so one test of the values covers all elements.
                self._errors[name] = torch.where(value.isfinite().all(), rest, error)
            else:
                self._errors.pop(name, None)  # loaded from a run with error feedback: sent once
            indices.append((chosen + start).to(torch.int32))
            values.append(value)
            start += gradient.numel()
        message = _Message([g for _, g in part], [v.numel() for v in values])
        payload = torch.cat(
            [torch.cat(indices).view(torch.uint8), torch.cat(values).view(torch.uint8)]
        )
        return message, payload

    def _count(self, gradient: torch.Tensor) -> int:
        return min(gradient.numel(), max(1, round(self.ratio * gradient.numel())))


def topk_hook(state: TopKCompression, bucket: GradBucket) -> torch.futures.Future[torch.Tensor]:
    """The communication hook of `TopKCompression`.

    Args:
        state: What was registered: `model.register_comm_hook(TopKCompression(model), topk_hook)`.
        bucket: The gradients, from DistributedDataParallel.

    Returns:
        The bucket, once it contains the means.

    Raises:
        TypeError: If `state` is no `TopKCompression`.
        ValueError: For sparse gradients, or if the hook is registered with another model.
    """
    if not isinstance(state, TopKCompression):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise TypeError(
            f"The state of topk_hook must be a TopKCompression, not {type(state).__name__}: "
            "ddp.register_comm_hook(TopKCompression(ddp), topk_hook)."
        )
    return state._reduce(bucket)  # pyright: ignore[reportPrivateUsage]


@dataclass(frozen=True)
class _Message:
    """Gradients whose elements travel together: indices as int32, then values.

    Attributes:
        gradients: Views of the bucket.
        counts: How many elements a rank sends of each.
    """

    gradients: list[torch.Tensor]
    counts: list[int]

    def combine(self, rows: torch.Tensor) -> None:
        """Write the mean of what the ranks sent into the gradients.

        Args:
            rows: [ranks, bytes], uint8.
        """
        dtype = self.gradients[0].dtype
        border = sum(self.counts) * torch.int32.itemsize
        indices = rows[:, :border].contiguous().view(torch.int32)
        values = rows[:, border:].contiguous().view(dtype)
        sizes = [gradient.numel() for gradient in self.gradients]
        total = torch.zeros(sum(sizes), dtype=_error_dtype(dtype), device=rows.device)
        # One rank at a time: a rank's indices differ from each other, so the order of additions is
        # fixed. Atomic additions of a GPU would give each rank other bits.
        for index, value in zip(indices, values, strict=True):
            total.index_add_(0, index, value.to(total.dtype))
        total /= len(rows)
        means = cast(tuple[torch.Tensor, ...], total.split(sizes))
        selections = cast(tuple[torch.Tensor, ...], values.split(self.counts, dim=1))
        parts = zip(self.gradients, means, selections, strict=True)
        for gradient, mean, sent in parts:
            if gradient.numel():
                # A rank that sent nothing finite may have had more such elements than it could
                # send.
                hidden = sent.isfinite().any(dim=1).logical_not().any()
                gradient.copy_(mean.masked_fill(hidden, math.nan).view(gradient.shape))


def _parts(
    named: list[tuple[str, torch.Tensor]], max_tensors: int
) -> Iterator[list[tuple[str, torch.Tensor]]]:
    """Runs of at most `max_tensors` gradients whose elements an int32 can count."""
    part: list[tuple[str, torch.Tensor]] = []
    size = 0
    for name, gradient in named:
        if part and (len(part) == max_tensors or size + gradient.numel() > _MAX_ELEMENTS):
            yield part
            part, size = [], 0
        part.append((name, gradient))
        size += gradient.numel()
    if part:
        yield part


def _error_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _future(work: dist.Work | None) -> torch.futures.Future[Any]:
    assert work is not None  # only ranks outside the group get None, and they have no gradients
    return cast(torch.futures.Future[Any], work.get_future())
