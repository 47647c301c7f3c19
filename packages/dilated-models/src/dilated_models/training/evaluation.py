"""Bits per byte of a model on a text."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from dilated_core import linear_cross_entropy
from dilated_core.checks import check_integer
from torch import Tensor

from dilated_models.longnet.language_model import LongNetLM, check_weights, evaluating
from dilated_models.text.streams import TokenStream
from dilated_models.text.windows import PackedWindows, text_row

_MOST_STRETCHES = 16


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """The loss of a model on a text.

    Attributes:
        bits_per_byte: Total bits of all targets, divided by the bytes they stand for.
        bits_per_token: The same, per target token.
        num_tokens: Targets scored.
        num_bytes: Bytes the targets stand for.
    """

    bits_per_byte: float
    bits_per_token: float
    num_tokens: int
    num_bytes: int


def scored_ranges(
    num_tokens: int, *, seq_len: int, max_tokens: int | None = None
) -> list[tuple[int, int]]:
    """Which tokens `evaluate` scores: up to 16 stretches, spread evenly over the text.

    Args:
        num_tokens: Length of the text.
        seq_len: Window length.
        max_tokens: Most targets to score; None means all. Above one window, it is rounded down to
            whole windows.

    Returns:
        Pairs (start, stop), in order, without overlap. Tokens start … stop − 1 are inputs, and the
        token after each of them is its target.

    Raises:
        TypeError: If a number is not an integer.
        ValueError: If the text has fewer than two tokens, or a number is below 1.

    Example:
        >>> scored_ranges(101, seq_len=10)
        [(0, 100)]
        >>> scored_ranges(101, seq_len=10, max_tokens=20)
        [(0, 10), (50, 60)]
    """
    seq_len = check_integer("seq_len", seq_len, at_least=1)
    if max_tokens is not None:
        max_tokens = check_integer("max_tokens", max_tokens, at_least=1)
    if num_tokens < 2:
        raise ValueError(
            f"the text has {num_tokens} tokens; it must have at least 2, one to see and one to "
            f"predict, so use more text."
        )
    total = num_tokens - 1
    if max_tokens is None or max_tokens >= total:
        return [(0, total)]
    if max_tokens <= seq_len:
        return [(0, max_tokens)]
    windows = max_tokens // seq_len
    stretches = min(_MOST_STRETCHES, windows)
    spare = total - windows * seq_len
    ranges: list[tuple[int, int]] = []
    for i in range(stretches):
        first, after = windows * i // stretches, windows * (i + 1) // stretches
        gap = spare * i // stretches
        ranges.append((first * seq_len + gap, after * seq_len + gap))
    return ranges


def evaluate(
    model: LongNetLM,
    stream: TokenStream,
    *,
    seq_len: int,
    max_tokens: int | None = None,
    batch_size: int = 8,
    autocast: torch.dtype | None = None,
    before_batch: Callable[[int, int], None] | None = None,
) -> Evaluation:
    """Score a text in windows of at most `seq_len` tokens, laid end to end inside documents.

    A document is a file. Each window starts without context, and no token is a target twice. The
    first token of a document is no target.

    Args:
        model: The model. Its mode and device are the same afterwards.
        stream: The text.
        seq_len: Longest context, in tokens.
        max_tokens: Score only this many, spread as in `scored_ranges`.
        batch_size: Windows scored at a time.
        autocast: Compute matrix products in this dtype; None means the dtype of the parameters.
        before_batch: Called before each batch with the number of targets scored so far and of all
            targets. An exception that it raises ends the evaluation.

    Raises:
        TypeError: If a number is not an integer.
        ValueError: As `scored_ranges`; or if `batch_size` is below 1, no document has two tokens,
            or the model is on the meta device.
    """
    check_weights(model)
    batch_size = check_integer("batch_size", batch_size, at_least=1)
    ranges = scored_ranges(len(stream), seq_len=seq_len, max_tokens=max_tokens)
    total = sum(stop - start for start, stop in ranges)
    with evaluating(model):
        nats, done, num_targets, num_bytes = 0.0, 0, 0, 0
        for start, stop in batches(ranges, seq_len * batch_size):
            if before_batch is not None:
                before_batch(done, total)
            part = PackedWindows.of([text_row(stream, start, stop, window=seq_len)])
            nats += float(_losses(model, part, autocast).sum())
            num_bytes += part.num_bytes
            num_targets += part.num_targets
            done += stop - start
    return evaluation_of(nats, num_targets, num_bytes)


def evaluation_of(nats: float, num_targets: int, num_bytes: int) -> Evaluation:
    """The loss from its sums over all targets.

    Raises:
        ValueError: If there is no target.
    """
    if not num_targets:
        raise ValueError(
            "no document of the text has 2 tokens; one must, a token to see and one to predict, so "
            "use longer files."
        )
    bits = nats / math.log(2)
    return Evaluation(
        bits_per_byte=bits / num_bytes,
        bits_per_token=bits / num_targets,
        num_tokens=num_targets,
        num_bytes=num_bytes,
    )


def batches(ranges: Sequence[tuple[int, int]], longest: int) -> Iterator[tuple[int, int]]:
    """The ranges in parts of at most `longest` tokens."""
    for start, stop in ranges:
        for first in range(start, stop, longest):
            yield first, min(first + longest, stop)


def autocast_to(dtype: torch.dtype | None, device: torch.device) -> AbstractContextManager[None]:
    """`torch.autocast` to a dtype; for None, a context that changes nothing."""
    return nullcontext() if dtype is None else torch.autocast(device.type, dtype)  # pyright: ignore[reportReturnType]


def score(
    model: LongNetLM,
    parts: Sequence[PackedWindows],
    *,
    autocast: torch.dtype | None,
    before_part: Callable[[int], None],
) -> list[Tensor]:
    """Nats of each target of each part, `(T,)` float64 on the CPU; 0 where there is no target.

    Args:
        model: The model. Its mode is the same afterwards.
        parts: Each is computed at once.
        autocast: As of `evaluate`.
        before_part: Called before each part with its number. An exception ends the work.
    """
    found: list[Tensor] = []
    with evaluating(model):
        for number, part in enumerate(parts):
            before_part(number)
            found.append(_losses(model, part, autocast))
    return found


@torch.no_grad()
def _losses(model: LongNetLM, part: PackedWindows, autocast: torch.dtype | None) -> Tensor:
    """Nats of each target, `(T,)` float64 on the CPU; 0 where there is no target."""
    device = model.embedding.weight.device
    targets = part.targets.to(device)
    with autocast_to(autocast, device):
        hidden = model.hidden_states(part.inputs.to(device), cu_seqlens=part.cu_seqlens)
        loss = linear_cross_entropy(hidden, model.output.weight, targets, reduction="none")
    return loss.cpu().double()
