"""Rows of text cut into windows, each of which a model sees without anything before it."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from dilated_models.text.streams import Int64Array, TokenStream

NO_TARGET = -100  # cross_entropy leaves it out by default


class Row(NamedTuple):
    """One row of a batch, cut into windows.

    Attributes:
        inputs: `(S,)`.
        targets: `(S,)`, the token after each input; `NO_TARGET` after the last of a document.
        byte_lengths: `(S,)`, the number of bytes that each target stands for; 0 for no target.
        starts: `(N,)`, the first position of each window, ascending from 0.
    """

    inputs: Int64Array
    targets: Int64Array
    byte_lengths: Int64Array
    starts: Int64Array


class PackedWindows(NamedTuple):
    """The windows of several rows, one after another, as `LongNetLM` takes packed documents.

    Attributes:
        inputs: `(T,)` int64.
        targets: `(T,)` int64, with `NO_TARGET` where there is none.
        byte_lengths: `(T,)` int64, the number of bytes that each target stands for.
        cu_seqlens: `(N + 1,)` int64, where each of N windows begins and the last one ends.
    """

    inputs: Tensor
    targets: Tensor
    byte_lengths: Tensor
    cu_seqlens: Tensor

    @classmethod
    def of(cls, rows: Iterable[Row]) -> PackedWindows:
        """Put rows one after another."""
        rows = list(rows)
        offsets = itertools.accumulate((len(row.inputs) for row in rows), initial=0)
        starts = [row.starts + offset for row, offset in zip(rows, offsets, strict=False)]
        inputs, targets, byte_lengths = (
            torch.from_numpy(np.concatenate(parts))  # pyright: ignore[reportUnknownMemberType]
            for parts in (
                [row.inputs for row in rows],
                [row.targets for row in rows],
                [row.byte_lengths for row in rows],
            )
        )
        bounds = np.append(np.concatenate(starts), len(inputs))
        return cls(inputs, targets, byte_lengths, torch.from_numpy(bounds))  # pyright: ignore[reportUnknownMemberType]

    @property
    def num_targets(self) -> int:
        """Number of targets."""
        return int((self.targets != NO_TARGET).sum())

    @property
    def num_bytes(self) -> int:
        """Number of bytes that the targets stand for."""
        return int(self.byte_lengths.sum())


def text_row(stream: TokenStream, start: int, stop: int, *, window: int) -> Row:
    """Tokens `start` … `stop − 1` of a text, cut every `window` tokens and between documents.

    Args:
        stream: The text; it has a token after the last input.
        start: First input.
        stop: One past the last input.
        window: Most tokens in a window.
    """
    tokens = stream.read(start, stop + 1)
    inputs, targets = tokens[:-1], tokens[1:].copy()
    byte_lengths = stream.byte_lengths(start + 1, stop + 1).copy()
    heads = stream.document_starts(start + 1, stop + 1) - start
    # The first token of a document is no target: nothing of the document comes before it.
    targets[heads - 1] = NO_TARGET
    byte_lengths[heads - 1] = 0
    cuts = np.union1d(np.arange(0, stop - start, window), heads[heads < stop - start])
    return Row(inputs, targets, byte_lengths, cuts.astype(np.int64))
