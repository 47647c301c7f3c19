"""Contextwise loss: the same targets in each row, each against a forward of its own."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from dilated_models import LongNetLM
from dilated_models.text.copies import copied_row
from dilated_models.training.contextwise import (
    Stretches,
    context_lengths,
    contextwise,
    read_stretches,
)
from hypothesis import given, settings
from hypothesis import strategies as st


class Numbers:
    """A stream of given tokens, each of which stands for `1 + token % 3` bytes."""

    def __init__(self, tokens: np.ndarray, starts: list[int]) -> None:
        self.tokens, self.starts = tokens, np.array(starts)

    def __len__(self) -> int:
        return len(self.tokens)

    def read(self, start: int, stop: int) -> np.ndarray:
        assert 0 <= start <= stop <= len(self)
        return self.tokens[start:stop]

    def byte_lengths(self, start: int, stop: int) -> np.ndarray:
        return 1 + self.tokens[start:stop] % 3

    def document_starts(self, start: int, stop: int) -> np.ndarray:
        return self.starts[(self.starts >= start) & (self.starts < stop)]

    def text_of(self, start: int, stop: int) -> bytes:
        raise NotImplementedError


@pytest.fixture
def stream() -> Numbers:
    tokens = torch.randint(61, (500,), generator=torch.Generator().manual_seed(5)).numpy()
    return Numbers(tokens, [0, 40, 61, 200, 233])


@pytest.fixture
def stretches(stream: Numbers) -> Stretches:
    found = read_stretches(stream, seq_len=50, max_targets=80)
    assert found is not None
    return found


def bits_after(model: LongNetLM, tokens: torch.Tensor, target: int) -> float:
    """Bits of a target after all the tokens before it."""
    with torch.no_grad():
        logits = model(tokens[None])[0, -1]
    return -logits.log_softmax(-1)[target].item() / math.log(2)


def test_each_row_scores_the_same_targets_with_its_own_context(model, stream, stretches):
    """S is 32: targets 17 … 32 of each stretch, in windows of 16 and of 32 tokens."""
    assert stretches.tokens.shape == (5, 33)
    result = contextwise(model, stream, stretches)
    num_bytes = int((1 + stretches.tokens[:, 17:] % 3).sum())
    assert (result.num_targets, result.num_bytes) == (80, num_bytes)
    assert [row.context for row in result.by_context] == [16, 32]
    for row in result.by_context:
        half, total = row.context // 2, 0.0
        for tokens in stretches.tokens:
            for target in range(17, 33):
                start = 16 - half + (target - 17) // half * half
                assert half < target - start <= row.context
                total += bits_after(model, tokens[start:target], int(tokens[target]))
        assert row.bits_per_byte == pytest.approx(total / num_bytes, rel=1e-10)


def test_by_distance_from_a_border_in_text_and_in_copies(model, stream, stretches):
    result = contextwise(model, stream, stretches)
    rows = [(row.nearest, row.farthest) for row in result.by_border]
    assert rows == [(0, 0), (1, 5)]
    copies = [
        copied_row(stream, seq_len=32, window=32, seed=0, sample=sample) for sample in range(5)
    ]
    copied = torch.from_numpy(np.stack([np.append(row.inputs, row.targets[-1]) for row in copies]))
    for tokens, name in (
        (stretches.tokens, "bits_per_byte"),
        (copied, "copied_bits_per_byte"),
    ):
        for row in result.by_border:
            queries = [q for q in range(16, 32) if row.nearest <= q % 6 <= row.farthest]
            bits = sum(
                bits_after(model, line[: q + 1], int(line[q + 1]))
                for line in tokens
                for q in queries
            )
            num_bytes = sum(1 + int(line[q + 1]) % 3 for line in tokens for q in queries)
            assert getattr(row, name) == pytest.approx(bits / num_bytes, rel=1e-10)


def test_without_a_border_there_is_no_such_table(config, stream, stretches):
    changed = dataclasses.replace(config, segment_lengths=(32,), dilation_rates=(1,))
    result = contextwise(LongNetLM(changed), stream, stretches)
    assert result.by_border == ()


@settings(max_examples=200, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 200), min_size=1, max_size=12),
    seq_len=st.integers(1, 150),
    max_targets=st.integers(1, 400),
)
def test_stretches_lie_in_documents_and_no_target_comes_twice(lengths, seq_len, max_targets):
    starts = np.cumsum([0, *lengths[:-1]])
    stream = Numbers(np.arange(sum(lengths)), starts.tolist())
    found = read_stretches(stream, seq_len=seq_len, max_targets=max_targets)
    if found is None:
        assert seq_len < 16 or sum(max(0, (n - 17) // 8 + 1) for n in lengths) < 4
        return
    longest = found.contexts[-1]
    assert longest <= seq_len
    assert found.contexts == context_lengths(longest)
    targets = found.tokens[:, longest // 2 + 1 :].flatten().tolist()
    assert len(set(targets)) == len(targets) <= max(max_targets, longest // 2)
    assert found.byte_lengths.flatten().tolist() == [1 + target % 3 for target in targets]
    for row in found.tokens.tolist():
        assert row == list(range(row[0], row[0] + longest + 1))
        first, last = np.searchsorted(starts, [row[0], row[-1]], side="right")
        assert first == last
    for context in found.contexts:
        inputs, scored = found.windows(context)
        assert inputs.shape[1] == context
        assert scored.flatten().tolist() == targets
        assert torch.equal(inputs[:, context // 2 :] + 1, scored)


def test_it_leaves_the_model_as_it_was_and_may_be_stopped(model, stream, stretches):
    model.train()
    calls = []
    contextwise(model, stream, stretches, before_batch=lambda *call: calls.append(call))
    assert calls == [(0, 480), (160, 480), (320, 480)]
    assert model.training

    def stop(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        contextwise(model, stream, stretches, before_batch=stop)
    assert model.training
