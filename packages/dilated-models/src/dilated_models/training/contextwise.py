"""Contextwise loss: the same targets, scored with more and more context before them.

Loss by position in a window mixes two things: how much context a target has, and which target it
is. Here every row of the table scores the same targets. The row of context c averages over targets
with c/2 … c tokens before them, so it also averages over the positions inside a segment.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from dilated_models.longnet.language_model import LongNetLM, check_weights
from dilated_models.text.copies import copied_row
from dilated_models.text.streams import TokenStream
from dilated_models.text.windows import NO_TARGET, PackedWindows
from dilated_models.training.borders import distances_from_border
from dilated_models.training.evaluation import score

if TYPE_CHECKING:
    from dilated_models.training.over_ranks import OverRanks

_SHORTEST_CONTEXT = 16
_FEWEST_STRETCHES = 4
_TOKENS_PER_FORWARD = 8192


@dataclass(frozen=True, kw_only=True)
class ContextLoss:
    """The loss of the targets with one length of context.

    Attributes:
        context: Most tokens of context, c; each target has c/2 + 1 at least.
        bits_per_byte: Mean over the targets, which are the same for every c.
    """

    context: int
    bits_per_byte: float


@dataclass(frozen=True, kw_only=True)
class BorderLoss:
    """The loss of the queries that stand at one range of distances behind a border.

    The distance is the number of tokens just before the query that its branches of rate 1 show it:
    0 for the first token of a segment. Where such branches have borders at different places, the
    one that shows most counts.

    Attributes:
        nearest: Least distance, in tokens.
        farthest: Largest distance, in tokens.
        bits_per_byte: Mean over the targets of these queries in plain text.
        copied_bits_per_byte: The same in edited copies, where only distant tokens help.
    """

    nearest: int
    farthest: int
    bits_per_byte: float
    copied_bits_per_byte: float


@dataclass(frozen=True, kw_only=True)
class Contextwise:
    """What a model gains from context.

    Attributes:
        num_targets: Targets, the same in each row of `by_context`.
        num_bytes: Bytes that these targets stand for.
        by_context: The loss with growing context.
        by_border: The loss by distance from a border, nearest first; empty if a branch of rate 1
            has no border in the longest context, or no branch has rate 1.
    """

    num_targets: int
    num_bytes: int
    by_context: tuple[ContextLoss, ...]
    by_border: tuple[BorderLoss, ...]


class Stretches(NamedTuple):
    """W stretches of text, each inside a document. The second half of each holds the targets.

    Attributes:
        tokens: `(W, S + 1)` int64.
        byte_lengths: `(W, S/2)` int64, the number of bytes that each target stands for.
    """

    tokens: Tensor
    byte_lengths: Tensor

    @property
    def contexts(self) -> list[int]:
        """Lengths of context: 16, 32, … S."""
        return context_lengths(self.tokens.shape[1] - 1)

    def windows(self, context: int) -> tuple[Tensor, Tensor]:
        """Windows that score each target once.

        Returns:
            Inputs `(N, c)` and targets `(N, c/2)`: those after the last c/2 inputs of each window.
            The targets have the order of the stretches for every c.
        """
        longest, half = self.tokens.shape[1] - 1, context // 2
        inputs = self.tokens[:, longest // 2 - half : longest].unfold(1, context, half)
        return inputs.flatten(0, 1), self.tokens[:, longest // 2 + 1 :].reshape(-1, half)


def context_lengths(seq_len: int) -> list[int]:
    """16, 32, 64 … as far as `seq_len` goes."""
    return [
        _SHORTEST_CONTEXT << i
        for i in range(seq_len.bit_length())
        if _SHORTEST_CONTEXT << i <= seq_len
    ]


def read_stretches(stream: TokenStream, *, seq_len: int, max_targets: int) -> Stretches | None:
    """Stretches spread evenly over a text.

    Args:
        stream: The text.
        seq_len: Longest context wanted. S is the largest of 16, 32, … up to it for which the text
            has four stretches, each in one document.
        max_targets: Most targets, rounded down to whole stretches, of which there is one at least.

    Returns:
        The stretches, or None if no document is long enough for a context of 16.
    """
    bounds = np.append(stream.document_starts(0, len(stream)), len(stream))
    first, lengths = bounds[:-1], np.diff(bounds)
    for longest in reversed(context_lengths(seq_len)):
        # Neighbouring stretches of a document overlap in S/2 tokens, and their targets do not.
        half = longest // 2
        counts = np.where(lengths > longest, (lengths - 1 - longest) // half + 1, 0)
        wanted = max(1, max_targets // half)
        total = int(counts.sum())
        if total < min(wanted, _FEWEST_STRETCHES):
            continue
        before = np.cumsum(counts) - counts
        count = min(wanted, total)
        chosen = [i * total // count for i in range(count)]
        documents = np.searchsorted(before, chosen, side="right") - 1
        starts = [
            int(first[document] + (i - before[document]) * half)
            for i, document in zip(chosen, documents, strict=True)
        ]
        return Stretches(
            _stacked([stream.read(start, start + longest + 1) for start in starts]),
            _stacked(
                [stream.byte_lengths(start + half + 1, start + longest + 1) for start in starts]
            ),
        )
    return None


def contextwise(
    model: LongNetLM,
    stream: TokenStream,
    stretches: Stretches,
    *,
    autocast: torch.dtype | None = None,
    before_batch: Callable[[int, int], None] | None = None,
    over: OverRanks | None = None,
) -> Contextwise:
    """Score the same targets with contexts of 16, 32, … tokens, and by distance from a border.

    Args:
        model: The model. Its mode and device are the same afterwards.
        stream: The text, of which edited copies are made.
        stretches: The targets, from `read_stretches`.
        autocast: Compute matrix products in this dtype; None means the dtype of the parameters.
        before_batch: Called before each batch with the number of inputs done and of all. An
            exception that it raises ends the evaluation.
        over: The processes over which the model is spread, all of which call this; None: one.

    Raises:
        ValueError: If the model is on the meta device.
    """
    check_weights(model)
    longest = stretches.contexts[-1]
    config = model.config
    is_dilated = config.has_branches  # other kinds have no borders of segments
    distances = distances_from_border(config.pattern, longest) if is_dilated else None
    sets = [stretches.windows(context) for context in stretches.contexts]
    lengths = [stretches.byte_lengths] * len(sets)
    if distances is not None:
        copies, copied_lengths = _copies(stream, longest, len(stretches.tokens))
        sets.append((copies[:, :-1], copies[:, longest // 2 + 1 :]))
        lengths.append(copied_lengths)
    parts = [part for inputs, targets in sets for part in _parts(inputs, targets)]
    total = sum(len(part.inputs) for part in parts)
    done = np.cumsum([0, *(len(part.inputs) for part in parts)])

    def before_part(number: int) -> None:
        if before_batch is not None:
            before_batch(int(done[number]), total)

    scored = partial(score, model) if over is None else over.score
    found = iter(scored(parts, autocast=autocast, before_part=before_part))
    nats = [
        # The targets follow the last inputs of each window.
        torch.cat([next(found) for _ in _parts(inputs, targets)])
        .view(inputs.shape)[:, -targets.shape[1] :]
        .reshape(-1, longest // 2)
        for inputs, targets in sets
    ]
    by_context = tuple(
        ContextLoss(context=context, bits_per_byte=bits_per_byte(loss, stretches.byte_lengths))
        for context, loss in zip(stretches.contexts, nats, strict=False)
    )
    return Contextwise(
        num_targets=stretches.byte_lengths.numel(),
        num_bytes=int(stretches.byte_lengths.sum()),
        by_context=by_context,
        by_border=()
        if distances is None
        else _by_border(nats[-2:], lengths[-2:], distances[longest // 2 :]),
    )


def bits_per_byte(nats: Tensor, byte_lengths: Tensor) -> float:
    """Total bits divided by total bytes."""
    return float(nats.double().sum() / math.log(2) / byte_lengths.sum())


def _by_border(
    nats: list[Tensor], byte_lengths: list[Tensor], distances: Tensor
) -> tuple[BorderLoss, ...]:
    """Distances 0, 1–2, 3–6, 7–14, … of queries in plain text and in copies."""
    rows: list[BorderLoss] = []
    nearest, last = 0, int(distances.max())
    while nearest <= last:
        farthest = 2 * nearest
        if 2 * (farthest + 1) > last:  # the next range would be cut short
            farthest = last
        inside = (distances >= nearest) & (distances <= farthest)
        if inside.any():
            plain, copied = (
                bits_per_byte(loss[:, inside], lengths[:, inside])
                for loss, lengths in zip(nats, byte_lengths, strict=True)
            )
            rows.append(
                BorderLoss(
                    nearest=nearest,
                    farthest=farthest,
                    bits_per_byte=plain,
                    copied_bits_per_byte=copied,
                )
            )
        nearest = farthest + 1
    return tuple(rows)


def _copies(stream: TokenStream, seq_len: int, count: int) -> tuple[Tensor, Tensor]:
    """`(W, S + 1)` tokens of edited copies, and `(W, S/2)` byte lengths of their last targets."""
    rows = [
        copied_row(stream, seq_len=seq_len, window=seq_len, seed=0, sample=sample)
        for sample in range(count)
    ]
    tokens = _stacked([np.append(row.inputs, row.targets[-1]) for row in rows])
    return tokens, _stacked([row.byte_lengths[seq_len // 2 :] for row in rows])


def _stacked(rows: list[np.ndarray]) -> Tensor:
    return torch.from_numpy(np.stack(rows))  # pyright: ignore[reportUnknownMemberType]


def _parts(inputs: Tensor, targets: Tensor) -> list[PackedWindows]:
    """Windows `(N, c)` with targets `(N, c/2)` of their last inputs, some thousand tokens a part.

    Each window is a document, so it begins without context.
    """
    context = inputs.shape[1]
    rows = max(1, _TOKENS_PER_FORWARD // context)
    labels = pad(targets, (context - targets.shape[1], 0), value=NO_TARGET)
    return [
        PackedWindows(
            x.flatten(),
            y.flatten(),
            torch.zeros_like(y.flatten()),  # which no caller reads
            torch.arange(len(x) + 1) * context,
        )
        for x, y in zip(torch.split(inputs, rows), torch.split(labels, rows), strict=True)
    ]
