"""Bits per byte against a direct computation, inside documents, and bounded."""

import itertools
import math

import numpy as np
import pytest
import torch
from dilated_models import LongNetLM
from dilated_models.training.evaluation import evaluate, scored_ranges


class Numbers:
    """A stream of given tokens, each of which stands for `1 + token % 3` bytes."""

    def __init__(self, tokens: torch.Tensor, starts: tuple[int, ...] = (0,)) -> None:
        self.tokens = tokens.numpy()
        self.starts = np.array(starts)

    def __len__(self) -> int:
        return len(self.tokens)

    def read(self, start: int, stop: int) -> np.ndarray:
        assert 0 <= start < stop <= len(self)
        return self.tokens[start:stop]

    def byte_lengths(self, start: int, stop: int) -> np.ndarray:
        return 1 + self.tokens[start:stop] % 3

    def document_starts(self, start: int, stop: int) -> np.ndarray:
        return self.starts[(self.starts >= start) & (self.starts < stop)]

    def text_of(self, start: int, stop: int) -> bytes:
        raise NotImplementedError


@pytest.fixture(params=[(0,), (0, 1, 30, 40, 41, 42, 90, 107)], ids=["one", "many"])
def stream(request) -> Numbers:
    """One document, or several: of one token, cut by a window, ending with a window."""
    tokens = torch.randint(61, (108,), generator=torch.Generator().manual_seed(5))
    return Numbers(tokens, request.param)


def bits_one_by_one(model: LongNetLM, stream: Numbers, seq_len: int) -> list[tuple[float, int]]:
    """(bits, bytes) of every target, each from its own forward."""
    tokens = torch.from_numpy(stream.tokens)
    scored = []
    for target in range(1, len(tokens)):
        if target in stream.starts:
            continue
        document = max(start for start in stream.starts if start < target)
        start = max((target - 1) // seq_len * seq_len, document)
        with torch.no_grad():
            logits = model(tokens[None, start:target])[0, -1]
        bits = -logits.log_softmax(-1)[tokens[target]].item() / math.log(2)
        scored.append((bits, 1 + int(tokens[target]) % 3))
    return scored


@pytest.mark.parametrize("batch_size", [1, 3, 100])
def test_equals_one_forward_per_target(model, stream, batch_size):
    scored = bits_one_by_one(model, stream, 40)
    result = evaluate(model, stream, seq_len=40, batch_size=batch_size)
    assert result.num_tokens == len(scored) == 108 - len(stream.starts)
    assert result.num_bytes == sum(n for _, n in scored)
    total = sum(bits for bits, _ in scored)
    assert result.bits_per_byte == pytest.approx(total / result.num_bytes, rel=1e-12)
    assert result.bits_per_token == pytest.approx(total / len(scored), rel=1e-12)


@pytest.mark.parametrize(
    ("num_tokens", "seq_len", "max_tokens"),
    [(1000, 10, 200), (1000, 10, 205), (1000, 7, 998), (50, 10, 3), (1000, 100, 300), (2, 10, 1)],
)
def test_ranges_are_apart_in_bounds_and_whole_windows(num_tokens, seq_len, max_tokens):
    ranges = scored_ranges(num_tokens, seq_len=seq_len, max_tokens=max_tokens)
    total = sum(stop - start for start, stop in ranges)
    assert max_tokens - seq_len < total <= max_tokens
    assert len(ranges) <= 16
    assert ranges[0][0] == 0
    assert ranges[-1][1] <= num_tokens - 1
    for (_, stop), (start, _) in itertools.pairwise(ranges):
        assert stop <= start
    if max_tokens > seq_len:
        assert all((stop - start) % seq_len == 0 for start, stop in ranges)


def test_stretches_spread_over_the_text():
    ranges = scored_ranges(100_001, seq_len=10, max_tokens=320)
    assert len(ranges) == 16
    gaps = [b[0] - a[0] for a, b in itertools.pairwise(ranges)]
    assert min(gaps) >= 6000


def test_what_is_scored_is_what_the_ranges_say(model, stream):
    read = []
    real = stream.read
    stream.read = lambda start, stop: read.append((start, stop - 1)) or real(start, stop)
    result = evaluate(model, stream, seq_len=10, max_tokens=40, batch_size=1)
    assert read == scored_ranges(108, seq_len=10, max_tokens=40)
    assert result.num_tokens == 40 - sum(
        start + 1 <= head <= stop for start, stop in read for head in stream.starts
    )


def test_the_model_is_left_as_it_was(model, stream):
    model.train()
    evaluate(model, stream, seq_len=50)
    assert model.training
    model.eval()
    evaluate(model, stream, seq_len=50)
    assert not model.training


def test_progress_is_told_and_may_stop_it(model, stream):
    calls = []
    evaluate(model, stream, seq_len=20, batch_size=2, before_batch=lambda *a: calls.append(a))
    assert calls == [(0, 107), (40, 107), (80, 107)]

    def stop(done: int, total: int) -> None:
        raise KeyboardInterrupt

    model.train()
    with pytest.raises(KeyboardInterrupt):
        evaluate(model, stream, seq_len=20, before_batch=stop)
    assert model.training


def test_refusals(model, stream):
    with pytest.raises(ValueError, match="seq_len is 0; it must be at least 1"):
        evaluate(model, stream, seq_len=0)
    with pytest.raises(ValueError, match="max_tokens is 0; it must be at least 1"):
        evaluate(model, stream, seq_len=1, max_tokens=0)
    with pytest.raises(ValueError, match="batch_size is -1; it must be at least 1"):
        evaluate(model, stream, seq_len=1, batch_size=-1)
    for name in ("seq_len", "max_tokens", "batch_size"):
        with pytest.raises(TypeError, match=rf"{name} is 2\.5; it must be an integer"):
            evaluate(model, stream, **{"seq_len": 2} | {name: 2.5})
    alone = Numbers(torch.zeros(3, dtype=torch.int64), (0, 1, 2))
    with pytest.raises(ValueError, match="no document of the text has 2 tokens; one must"):
        evaluate(model, alone, seq_len=1)
    with pytest.raises(ValueError, match="the text has 1 tokens; it must have at least 2"):
        evaluate(model, Numbers(torch.zeros(1, dtype=torch.int64)), seq_len=1)
