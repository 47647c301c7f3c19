"""The counting predictor, against dictionaries that are filled one token at a time."""

import math
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import pytest
import torch
from dilated_models.text.files import text_files
from dilated_models.text.streams import ByteStream
from dilated_models.training import predictor
from dilated_models.training.contextwise import Stretches, read_stretches
from dilated_models.training.predictor import predictor_losses


def bits_one_by_one(stretches: Stretches, known: list[int], num_tokens: int, context: int) -> float:
    """Total bits of all targets; each window is read from its start for each target."""
    counts: dict[tuple[int, ...], Counter[int]] = defaultdict(Counter)
    for order in range(6):
        for place in range(order, len(known)):
            counts[tuple(known[place - order : place])][known[place]] += 1
    total = 0.0
    longest = stretches.tokens.shape[1] - 1
    for row in stretches.tokens.tolist():
        for target in range(longest // 2 + 1, longest + 1):
            half = context // 2
            start = longest // 2 - half + (target - longest // 2 - 1) // half * half
            window = row[start:target]
            p = 1 / num_tokens
            for order in range(6):
                seen = counts[tuple(window[len(window) - order :])]
                if seen:
                    p = (seen[row[target]] + len(seen) * p) / (seen.total() + len(seen))
            for order, inertia in enumerate(predictor._INERTIA):
                suffix = window[len(window) - order :]
                followers = [
                    window[i + order]
                    for i in range(len(window) - order)
                    if window[i : i + order] == suffix
                ]
                p = (followers.count(row[target]) + inertia * p) / (len(followers) + inertia)
            total -= math.log2(p)
    return total


def test_equals_counting_one_by_one(text: Path):
    stream = ByteStream(text_files([text])[0])
    stretches = read_stretches(stream, seq_len=64, max_targets=130)
    assert stretches is not None
    training = ByteStream(text_files([text / "file1.py", text / "file22.py"])[0])
    known = training.read(0, len(training) - 1).tolist()
    losses = predictor_losses(stretches, training, num_tokens=256)
    assert [loss.context for loss in losses] == [16, 32, 64]
    for loss in losses:
        bits = bits_one_by_one(stretches, known, 256, loss.context)
        expected = bits / stretches.byte_lengths.sum().item()
        assert loss.bits_per_byte == pytest.approx(expected, rel=1e-9)


def test_a_text_that_repeats_itself_gets_cheaper_with_context():
    generator = np.random.default_rng(0)
    passage = generator.integers(0, 50_000, 100)
    tokens = torch.from_numpy(np.resize(passage, (3, 513)))
    stretches = Stretches(tokens, torch.ones(3, 256, dtype=torch.int64))

    class Other:
        """A training text of other tokens."""

        def __len__(self) -> int:
            return 1000

        def read(self, start: int, stop: int) -> np.ndarray:
            return generator.integers(0, 50_000, stop - start)

    losses = predictor_losses(stretches, Other(), num_tokens=50_000)  # pyright: ignore
    bits = {loss.context: loss.bits_per_byte for loss in losses}
    assert bits[16] == pytest.approx(math.log2(50_000), abs=2)  # the passage is longer
    assert bits[512] < 3 < 10 < bits[64]
