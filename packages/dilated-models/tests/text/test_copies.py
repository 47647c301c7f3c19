"""Edited copies: a passage of the text again and again, and nothing but seed and number decide."""

from pathlib import Path

import numpy as np
import pytest
from dilated_models.text.copies import PLAIN_SHARE, copied_row
from dilated_models.text.files import text_files
from dilated_models.text.streams import ByteStream
from dilated_models.text.windows import NO_TARGET
from hypothesis import given, settings
from hypothesis import strategies as st

DOCUMENT = 90  # tokens


class Places:
    """A stream in which no token comes twice, so the place of a passage can be read from it."""

    def __init__(self, length: int) -> None:
        self.length = length

    def __len__(self) -> int:
        return self.length

    def read(self, start: int, stop: int) -> np.ndarray:
        assert 0 <= start <= stop <= self.length
        return np.arange(start, stop)

    def byte_lengths(self, start: int, stop: int) -> np.ndarray:
        return 1 + np.arange(start, stop) % 3

    def document_starts(self, start: int, stop: int) -> np.ndarray:
        return np.arange(start, stop)[np.arange(start, stop) % DOCUMENT == 0]

    def text_of(self, start: int, stop: int) -> bytes:
        raise NotImplementedError


def period_of(tokens: np.ndarray) -> int:
    """The shortest distance at which most tokens are equal; 10 edits in 100 break 19 matches."""
    lags = range(1, len(tokens) // 2 + 1)
    return next(lag for lag in lags if (tokens[lag:] == tokens[:-lag]).mean() > 0.6)


def test_a_quarter_of_the_windows_of_a_warm_up_is_plain_text_cut_between_documents():
    stream = Places(1 << 40)
    plain = 0
    for sample in range(100):
        row = copied_row(
            stream, seq_len=800, window=200, seed=7, sample=sample, plain_share=PLAIN_SHARE
        )
        assert {0, 200, 400, 600} <= set(row.starts.tolist())
        for start in (0, 200, 400, 600):
            inputs, targets = row.inputs[start:][:200], row.targets[start:][:200]
            starts = row.starts[(row.starts >= start) & (row.starts < start + 200)] - start
            if (np.diff(inputs) != 1).any():
                assert starts.tolist() == [0]
                assert (targets != NO_TARGET).all()
                continue
            plain += 1
            heads = (inputs + 1) % DOCUMENT == 0
            assert np.array_equal(targets, np.where(heads, NO_TARGET, inputs + 1))
            assert set(starts.tolist()) == {0} | set(
                np.flatnonzero(inputs % DOCUMENT == 0).tolist()
            )
    assert abs(plain - 100) < 4.5 * 9  # standard deviation 9


@settings(max_examples=100, deadline=None)
@given(
    seq_len=st.integers(1, 700),
    window=st.integers(1, 700),
    seed=st.integers(0, 2**64 - 1),
    sample=st.integers(0, 2**40),
)
def test_a_row_of_copies(seq_len, window, seed, sample):
    stream = Places(seq_len + 1)
    row = copied_row(stream, seq_len=seq_len, window=window, seed=seed, sample=sample)
    assert row.starts.tolist() == list(range(0, seq_len, window))
    assert len(row.inputs) == len(row.targets) == len(row.byte_lengths) == seq_len
    assert np.array_equal(row.byte_lengths, 1 + row.targets % 3)
    for start in row.starts.tolist():
        stop = min(start + window, seq_len)
        inputs, targets = row.inputs[start:stop], row.targets[start:stop]
        assert np.array_equal(inputs[1:], targets[:-1])
        if stop - start >= 200:
            tokens = np.append(inputs, targets[-1])
            period = period_of(tokens)
            assert 16 <= period <= (stop - start) // 2
            assert (np.diff(tokens) == 1).mean() > 0.6
    again = copied_row(stream, seq_len=seq_len, window=window, seed=seed, sample=sample)
    assert all(np.array_equal(a, b) for a, b in zip(row, again, strict=True))


def test_periods_are_log_uniform_and_a_tenth_is_edited():
    stream = Places(1 << 40)
    copied = [
        copied_row(stream, seq_len=1024, window=1024, seed=7, sample=sample)
        for sample in range(300)
    ]
    periods, edited = [], 0
    for row in copied:
        period = period_of(row.inputs)
        periods.append(period)
        copies = row.inputs[: 1024 // period * period].reshape(-1, period)
        edited += (row.inputs != np.resize(np.median(copies, axis=0), 1024)).mean() / len(copied)
    assert 16 <= min(periods) < 20
    assert 450 < max(periods) <= 512
    # Of five octaves from 16 to 512, each has a fifth, 60 of 300: standard deviation 7.
    for octave in range(5):
        count = sum(16 << octave <= period < 32 << octave for period in periods)
        assert abs(count - len(copied) / 5) < 4.5 * 7
    assert 0.09 < edited < 0.13  # above 10 %: a median of two copies, one of them edited, is off


def test_edits_are_tokens_of_the_text_elsewhere_and_seeds_differ():
    stream = Places(1 << 40)
    rows = {
        (seed, sample): copied_row(stream, seq_len=512, window=512, seed=seed, sample=sample)
        for seed in (0, 1, 2**64 - 1)
        for sample in range(3)
    }
    firsts = {int(row.inputs[0]) for row in rows.values()}
    assert len(firsts) == 9
    for row in rows.values():
        period, middle = period_of(row.inputs), int(np.median(row.inputs))
        foreign = row.inputs[abs(row.inputs - middle) > period]
        assert 20 < len(foreign) < 85  # of 512, a tenth: standard deviation 7
        assert 0 <= foreign.min() <= foreign.max() < 1 << 40


@pytest.mark.parametrize("window", [1, 2, 3, 17, 32])
def test_short_windows_and_real_text(text: Path, window):
    stream = ByteStream(text_files([text])[0])
    row = copied_row(stream, seq_len=32, window=window, seed=0, sample=3)
    assert len(row.inputs) == 32
    assert row.inputs.max() < 256
    assert row.byte_lengths.tolist() == [1] * 32
