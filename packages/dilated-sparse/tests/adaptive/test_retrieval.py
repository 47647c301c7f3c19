"""A trained model finds a value far away with a tenth of the blocks: one seed of the benchmark."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).parents[4] / "benchmarks"


@pytest.fixture
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.exhaustive
@pytest.mark.usefixtures("one_thread")
def test_a_tenth_of_the_blocks_finds_what_a_window_cannot_see(monkeypatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    from adaptive_retrieval import Steps, train

    adaptive = train("adaptive", 0, Steps(600, 300, 60))
    assert adaptive["accuracies_before"]["dense"] >= 0.95  # the task can be learned
    assert adaptive["accuracy"] >= 0.95
    assert adaptive["kept_blocks_of_last_row"] <= 0.1 * adaptive["num_blocks"]
    window = train("local_window", 0, Steps(600, 0, 60))
    assert window["accuracies_before"]["dense"] >= 0.95
    assert abs(window["accuracy"] - window["chance"]) < 0.05  # 3 standard errors of 256 answers
