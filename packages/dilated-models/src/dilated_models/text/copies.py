"""Edited copies of a text: windows in which looking far back pays from the first step.

In natural text the gain from distant tokens is small and comes late in training: a model must first
learn to find the previous occurrence of what it reads and to copy what followed. A window that
repeats one passage, at a distance of any scale, teaches that in far fewer tokens.
"""

from __future__ import annotations

import math

import numpy as np

from dilated_models.text.streams import TokenStream
from dilated_models.text.windows import Row, text_row

_SHORTEST_PERIOD = 16
_EDITED_SHARE = 0.1
# In a warm-up: plain windows and frequent edits also teach when not to copy.
PLAIN_SHARE = 0.25


def copied_row(
    stream: TokenStream,
    *,
    seq_len: int,
    window: int,
    seed: int,
    sample: int,
    plain_share: float = 0.0,
) -> Row:
    """A row of windows, each of which repeats a passage of the text, with edits.

    The period is drawn log-uniformly from 16 … window / 2 tokens. 10 % of the tokens are replaced
    by other tokens of the text. All draws follow from `seed` and `sample`, so a resumed run needs
    only its step.

    Args:
        stream: The text, of at least `seq_len + 1` tokens.
        seq_len: Tokens of the row.
        window: Most tokens in a window.
        seed: Of the run.
        sample: Number of the row, from 0.
        plain_share: Share of the windows, drawn at random, that are plain text instead, cut where
            a document begins.
    """
    random = np.random.default_rng((seed, sample))
    parts: list[Row] = []
    for start in range(0, seq_len, window):
        length = min(window, seq_len - start)
        if random.random() < plain_share:
            first = int(random.integers(len(stream) - length))
            part = text_row(stream, first, first + length, window=length)
        else:
            part = _copied_window(stream, length, random)
        parts.append(part._replace(starts=part.starts + start))
    return Row(*(np.concatenate(arrays) for arrays in zip(*parts, strict=True)))


def _copied_window(stream: TokenStream, length: int, random: np.random.Generator) -> Row:
    """One window of copies."""
    longest = max(1, length // 2)
    shortest = min(_SHORTEST_PERIOD, longest)
    period = round(math.exp(random.uniform(math.log(shortest), math.log(longest))))
    # A passage that spans the border of two documents is a passage like any other here.
    start = int(random.integers(len(stream) - period + 1))
    tokens = np.resize(stream.read(start, start + period), length + 1)
    byte_lengths = np.resize(stream.byte_lengths(start, start + period), length + 1)
    edited = np.flatnonzero(random.random(length + 1) < _EDITED_SHARE)
    # One read instead of one for each edit: the new tokens are neighbours in the text, and land
    # far apart.
    start = int(random.integers(len(stream) - len(edited) + 1))
    tokens[edited] = stream.read(start, start + len(edited))
    byte_lengths[edited] = stream.byte_lengths(start, start + len(edited))
    return Row(tokens[:-1], tokens[1:], byte_lengths[1:], np.zeros(1, dtype=np.int64))
