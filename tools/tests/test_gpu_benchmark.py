"""The parts of the GPU benchmark that need no GPU: contenders, timing, goals, cases, tuning."""

import time

import pytest
import torch
from dilated_core import DilatedPattern
from dilated_core.backends.registry import get_backend

from tools.packages import ROOT

PARTS = ("forward", "forward_backward")


@pytest.fixture(autouse=True)
def benchmarks(monkeypatch):
    """The scripts of benchmarks/ import each other by their plain names."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))


@pytest.mark.parametrize("is_causal", [False, True])
def test_windows_get_the_flops_of_the_pattern(is_causal):
    from gpu_contenders import dense_contenders

    pattern = DilatedPattern([256, 512, 1024], [1, 2, 4])
    shape = (1, 4096, 4, 64)
    flops = pattern.flops(4096, 4, 64, is_causal=is_causal)
    found = dense_contenders(torch.device("cuda"), shape, 256, is_causal, flops)
    assert len(found) == 4
    for name, contender in found.items():
        B, S, H, D = contender.shape or shape
        dense = DilatedPattern([S], [1]).flops(S, H, D, batch_size=B, is_causal=is_causal)
        assert contender.flops == dense
        if name.startswith("windows"):
            assert contender.flops == pytest.approx(flops, rel=0.15)


def test_calls_are_timed_in_turn():
    from gpu_timing import ROUNDS, time_in_turn

    order = []
    calls = {"a": lambda: order.append("a") or time.sleep(2e-3), "b": lambda: order.append("b")}
    spreads = time_in_turn(calls, torch.device("cpu"), seconds=0.2)
    assert order == ["a", "b"] * ROUNDS
    assert spreads["a"]["runs"] == ROUNDS
    assert 2 <= spreads["a"]["low_ms"] <= spreads["a"]["median_ms"] <= spreads["a"]["high_ms"]


def test_cases_of_the_benchmark():
    from gpu_attention import CASES, QUICK_CASES

    assert len(set(CASES)) == len(CASES)
    assert set(QUICK_CASES) <= set(CASES)
    assert {case.seq_len for case in CASES} >= {2**i for i in range(13, 23)} - {2**14}
    assert {case.head_dim for case in CASES} == {64, 128}
    for case in CASES:
        pattern = case.pattern()
        assert pattern.segment_lengths[0] == case.w0
        assert max(pattern.segment_lengths) <= case.seq_len
        if not case.is_paper:
            assert 2 * max(pattern.segment_lengths) > case.seq_len


def row(seq_len, *, w0=2048, ms=1.0, peak=100, **others):
    """A row as on a GPU, from milliseconds and TFLOP/s."""
    contenders = {}
    for name, (ms_, tflops) in {"triton": (ms, 300.0), **others}.items():
        part = {"median_ms": ms_, "low_ms": ms_, "high_ms": ms_, "tflops": tflops}
        contenders[name] = {name_: {**part, "peak_bytes": peak} for name_ in PARTS}
    return {
        "seq_len": seq_len,
        "w0": w0,
        "num_heads": 12,
        "head_dim": 64,
        "device": "cuda",
        "is_causal": True,
        "is_paper": False,
        "memory_goal_bytes": 100,
        "contenders": contenders,
    }


def verdicts(rows):
    from gpu_goals import format_row, goals, ratios

    rows = [{**row, "ratios": ratios(row)} for row in rows]
    assert all("300/300 TFLOP/s" in format_row(row) for row in rows)
    return {goal["goal"]: (goal["met"], goal["evidence"]) for goal in goals(rows)}


def pick(found, *words):
    (verdict,) = [v for goal, v in found.items() if all(word in goal for word in words)]
    return verdict


def test_goals_are_met_not_met_or_not_measured():
    good = [
        row(2**13, dense_flash=(9.0, 400.0), gather_flash=(3.0, 100.0)),
        row(2**17, ms=10.0),
        row(2**22, ms=340.0),
    ]
    found = verdicts(good)
    assert len(found) == 8 + 2 + 1 + 2 + 4
    assert pick(found, "forward >=", "of dense_flash")[0] == "yes"
    assert pick(found, "forward >=", "of dense_cudnn")[0] == "not measured"
    assert pick(found, "forward >=", "gather")[0] == "yes"
    assert pick(found, "memory")[0] == "yes"
    assert pick(found, "forward latency linear")[0] == "yes"
    assert pick(found, "forward never slower than dense_flash")[0] == "yes"
    assert {met for met, _ in verdicts([]).values()} == {"not measured"}
    on_cpu = [{**row, "device": "cpu"} for row in good]
    assert {met for met, _ in verdicts(on_cpu).values()} == {"not measured"}
    slow = row(2**11, ms=1.2, auto=(1.0, 400.0), dense_cudnn=(1.1, 400.0))
    assert pick(verdicts([slow]), "forward never slower than dense_cudnn")[0] == "yes"


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        (row(2**13, dense_flash=(9.0, 401.0)), ("forward >=", "of dense_flash")),
        (row(2**13, windows_cudnn=(9.0, 470.0)), ("forward_backward >=", "of windows_cudnn")),
        (row(2**13, gather_flash=(2.99, 100.0)), ("forward >=", "gather")),
        (row(2**13, peak=101), ("memory",)),
        (row(2**22, ms=360.0), ("forward latency linear",)),
        (row(2**13, dense_cudnn=(0.99, 400.0)), ("forward never slower than dense_cudnn",)),
    ],
)
def test_one_bad_row_is_enough_for_no(bad, words):
    peers = dict.fromkeys(("dense_flash", "dense_cudnn", "windows_cudnn"), (90.0, 400.0))
    good = row(2**17, ms=10.0, **peers, gather_flash=(30.0, 100.0))
    met, evidence = pick(verdicts([good, bad]), *words)
    assert met == "no", evidence


def test_a_search_goes_on_where_it_was_stopped(monkeypatch):
    import gpu_tuning
    from gpu_tuning import Config, Problem, best_lines, tune

    tried = []

    def compare(problem, kind, config, inputs):
        tried.append((kind, config))
        if config.block_m == 128:
            raise MemoryError("shared memory\nand more")
        ms = {16: 2.0, 32: 1.0, 64: 1.5}[config.block_m]
        return {"ms": ms, "table_ms": 1.5, "gain": 1.5 / ms}

    monkeypatch.setattr(gpu_tuning, "compare", compare)
    problem = Problem(16, "float32", True, 32, 16, 1, "cpu")
    wanted = [("forward", Config(m, 16, 4, 2)) for m in (16, 32, 64, 128)]
    rows, late = [], {"deadline": time.monotonic() + 60, "workers": 0}
    search = tune(problem, wanted, rows, **late)
    next(search)
    next(search)
    assert len(rows) == 2
    assert not list(tune(problem, wanted, rows, deadline=0.0, workers=0))
    more = [*wanted, ("dq", wanted[0][1])]
    list(tune(problem, more, rows, **late))
    assert tried == more
    assert best_lines(rows)[0] == (
        "head_dim 16 float32 causal forward: (32, 16, 4, 2) 1.000 ms (1.500x), "
        "(64, 16, 4, 2) 1.500 ms (1.000x), (16, 16, 4, 2) 2.000 ms (0.750x); 1 of 4 failed"
    )
    assert [row["failed"] for row in rows if "failed" in row] == ["MemoryError: shared memory"]


def test_a_config_is_timed_by_a_backend_of_its_own():
    from gpu_tuning import Config, configured

    with configured("dq", Config(32, 128, 8, 3)) as name:
        assert get_backend(name).configs == {"dq": (32, 128, 8, 3)}
    with pytest.raises(ValueError, match="triton_tuned"):
        get_backend(name)
