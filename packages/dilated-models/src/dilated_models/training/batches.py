"""Which rows of the text a step trains on, as a pure function of seed, step and rank."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

from dilated_models.text.copies import PLAIN_SHARE, copied_row
from dilated_models.text.order import RowOrder
from dilated_models.text.streams import TokenStream
from dilated_models.text.windows import PackedWindows, Row, text_row
from dilated_models.training.config import TrainingConfig

_MOST_PLACES = 3


class Batch(NamedTuple):
    """The rows of a batch that one process computes, in parts that it computes one by one.

    Attributes:
        parts: Equally many rows each.
        samples: The number of each row, over all parts.
        is_copied: Whether the rows are edited copies of the text.
        starts: For plain text, the first token of each row.
    """

    parts: list[PackedWindows]
    samples: Sequence[int]
    is_copied: bool
    starts: list[int]

    @property
    def num_targets(self) -> int:
        """Number of targets."""
        return sum(part.num_targets for part in self.parts)

    @property
    def num_bytes(self) -> int:
        """Number of bytes that the targets stand for."""
        return sum(part.num_bytes for part in self.parts)

    def suspects(self, stream: TokenStream, losses: Sequence[float] | None) -> str | None:
        """Where the rows of the first part stand whose loss is not finite; None if all are.

        Args:
            stream: The text.
            losses: Of each part; None: all rows are suspect.
        """
        if losses is None:
            return self.places(stream)
        bad = [part for part, loss in enumerate(losses) if not math.isfinite(loss)]
        return self.places(stream, bad[0]) if bad else None

    def places(self, stream: TokenStream, part: int | None = None) -> str:
        """Where the rows of a part stand in the text, or those of all parts."""
        count = len(self.samples) // len(self.parts)
        rows = slice(None) if part is None else slice(part * count, (part + 1) * count)
        samples = self.samples[rows]
        if self.is_copied:
            return f"edited copies, rows {samples[0]} to {samples[-1]} of the run"
        starts = self.starts[rows]
        found = [
            f"{str(path)!r} from byte {first}"
            for path, first in map(stream.place_of, starts[:_MOST_PLACES])
        ]
        more = len(starts) - len(found)
        return ", ".join(found) + (f" and {more} more" if more else "")


def batch_of_step(
    config: TrainingConfig,
    step: int,
    stream: TokenStream,
    order: RowOrder,
    *,
    num_parts: int,
    rows_of_rank: Callable[[Sequence[int]], Sequence[int]],
) -> Batch:
    """The batch of a step.

    Args:
        config: The numbers of the run.
        step: From 0.
        stream: The text.
        order: Of its rows.
        num_parts: In how many parts the rows of this rank are computed.
        rows_of_rank: Selects those rows from all of the batch.
    """
    window = config.window_at(step)
    plain_step = step - config.copied_steps
    is_copied = plain_step < 0
    first = (step if is_copied else plain_step) * config.batch_size
    samples = rows_of_rank(range(first, first + config.batch_size))
    starts: list[int] = []
    if is_copied:
        rows: list[Row] = [
            copied_row(
                stream,
                seq_len=config.seq_len,
                window=window,
                seed=config.seed,
                sample=sample,
                plain_share=PLAIN_SHARE,
            )
            for sample in samples
        ]
    else:
        starts = [order.start(sample) for sample in samples]
        rows = [text_row(stream, start, start + config.seq_len, window=window) for start in starts]
    count = len(rows) // num_parts
    parts = [PackedWindows.of(rows[i : i + count]) for i in range(0, len(rows), count)]
    return Batch(parts, samples, is_copied, starts)
