"""The comparison of two commits' benchmarks counts what changed beyond the noise."""

import json

import pytest

from tools.packages import ROOT


@pytest.fixture(autouse=True)
def benchmarks(monkeypatch):
    """The scripts of benchmarks/ import each other by their plain names."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))


def folder_of(path, **results):
    path.mkdir()
    for name, rows in results.items():
        (path / f"{name}.json").write_text(json.dumps({"benchmark": name, "rows": rows}))
    return str(path)


def changes_of(before, after, noise=0.1):
    import compare

    found, alone = compare.changes({"x": before}, {"x": after}, noise=noise)
    return {(change.row, change.name): change for change in found}, alone


def test_a_slower_row_fails_and_a_faster_one_does_not(tmp_path, capsys):
    import compare

    def row(seconds):
        return {"seq_len": 64, "forward": {"median_s": seconds, "low_s": 0.9 * seconds}}

    rows = [{**row(1.0), "dtype": "float32"}, {**row(1.0), "dtype": "bfloat16"}]
    slower = [{**row(1.5), "dtype": "float32"}, {**row(0.5), "dtype": "bfloat16"}]
    a, b = folder_of(tmp_path / "a", length=rows), folder_of(tmp_path / "b", length=slower)
    assert compare.main([a, b]) == 0
    text = capsys.readouterr().out
    assert " 1.500 (1.227 to 1.833) length: forward.median_s 1 -> 1.5; " in text
    assert "seq_len=64, dtype=float32" in text
    assert "2 numbers in both; outside the noise: 1 worse, 1 better" in text
    assert compare.main([a, b, "--fail-above", "1.4"]) == 1
    assert compare.main([a, b, "--fail-above", "1.6"]) == 0
    assert compare.main([a, b, "--fail-above", "1.4", "--noise", "0.3"]) == 0
    assert compare.main([b, a, "--fail-above", "1.4"]) == 1  # the other row
    assert compare.main([a, a, "--fail-above", "1"]) == 0
    assert compare.main([a, b, "--fail-above", "1", "--only", "ring"]) == 0


def test_quartiles_are_the_spread():
    row = {"token": {"median_cpu_s": 1.0, "low_cpu_s": 0.8, "high_cpu_s": 1.25}}
    after = {"token": {"median_cpu_s": 1.2, "low_cpu_s": 1.2, "high_cpu_s": 1.5}}
    found, _ = changes_of([row], [after])
    (change,) = found.values()
    assert (change.worse, change.low, change.high) == pytest.approx((1.2, 1.2 / 1.25, 1.5 / 0.8))
    assert not change.is_outside_noise


def test_the_quartiles_of_a_call_are_not_those_of_another_time():
    row = {"call_s": 1.0, "other_s": 1.0, "low_s": 0.5, "high_s": 2.0, "hidden": None}
    after = {"call_s": 1.5, "other_s": 1.5, "low_s": 1.0, "high_s": 2.0, "hidden": 0.5}
    found, alone = changes_of([row], [after])
    assert {name: change.is_outside_noise for (_, name), change in found.items()} == {
        "call_s": False,
        "other_s": True,
    }
    assert not alone


def test_memory_below_that_of_the_start_is_none():
    found, _ = changes_of([{"peak_bytes": -5}], [{"peak_bytes": 7}])
    (change,) = found.values()
    assert (change.before, change.worse) == (0, float("inf"))


def test_seeds_are_the_spread_and_more_accuracy_is_better():
    def rows(*values):
        return [
            {
                "contender": "dense",
                "seed": i,
                "accuracy": [{"distances": [1, 2], "accuracy": x, "tokens": 9}],
            }
            for i, x in enumerate(values)
        ]

    found, alone = changes_of(rows(0.8, 0.5, 0.6), rows(0.3, 0.2, 0.4))
    (((what, name), change),) = found.items()
    assert what == "contender=dense, distances=[1, 2], tokens=9"
    assert name == "accuracy.accuracy"
    assert (change.worse, change.low, change.high) == pytest.approx((2.0, 0.5 / 0.4, 0.8 / 0.2))
    assert not alone


def test_zero_bytes_are_as_many_as_zero_bytes():
    found, _ = changes_of([{"ranks": 1, "bytes": 0}], [{"ranks": 1, "bytes": 0}])
    (change,) = found.values()
    assert change.worse == 1
    found, _ = changes_of([{"ranks": 1, "bytes": 0}], [{"ranks": 1, "bytes": 5}])
    (change,) = found.values()
    assert change.worse == float("inf")
    assert change.is_outside_noise


def test_rows_of_other_shapes_are_not_compared():
    found, alone = changes_of([{"seq_len": 1, "bytes": 5}], [{"seq_len": 2, "bytes": 7}])
    assert not found
    assert alone == ["x: 1 numbers only in A", "x: 1 numbers only in B"]


def test_every_committed_result_can_be_compared():
    import compare

    before = compare.read_results(str(ROOT / "benchmarks" / "results"))
    found, alone = compare.changes(before, before, noise=0.0)
    assert not alone
    assert {change.benchmark for change in found} == set(before)
    for change in found:
        assert change.low <= change.worse <= change.high or change.worse == 1


def test_a_commit_is_read_from_git():
    import compare

    head = compare.read_results("HEAD")
    assert "length" in head
    with pytest.raises(ValueError, match="neither a folder nor a commit"):
        compare.read_results("no-such-commit")


def test_a_folder_without_results_is_refused(tmp_path, capsys):
    import compare

    with pytest.raises(SystemExit):
        compare.main([str(tmp_path), str(tmp_path)])
    assert "has no result files" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        compare.main([])
    assert "name two commits or folders, or --timed BASE" in capsys.readouterr().err


def test_what_the_control_differs_by_is_noise():
    import compare

    def row(ratio, quartiles, control):
        shape = {"seq_len": 1, "is_causal": True, "dtype": "float32", "part": "inference"}
        times = {"base_s": 1.0, "here_s": 1 / ratio, "ratio": ratio, "control_ratio": control}
        return {**shape, **times, "ratio_quartiles": quartiles}

    (quiet,) = compare.timed_changes([row(0.9, [0.88, 0.92], 1.0)])
    assert quiet.worse == pytest.approx(1 / 0.9)
    assert (quiet.low, quiet.high) == pytest.approx((1 / 0.92, 1 / 0.88))
    assert quiet.is_outside_noise
    (noisy,) = compare.timed_changes([row(0.9, [0.88, 0.92], 0.85)])
    assert not noisy.is_outside_noise


def test_a_commit_is_timed_in_turn_with_a_control(monkeypatch, tmp_path, capsys):
    import compare
    import timed_in_turn

    class Worker:
        """Takes half a second where the other checkout takes one."""

        def __init__(self, checkout):
            self.is_here = checkout == timed_in_turn.ROOT
            self.calls = 0

        def seconds(self, case, part, calls):
            self.calls += 1
            return 0.5 if self.is_here else 1.0

        def stop(self):
            assert self.calls == 8  # two parts of one round that warms up and three

    monkeypatch.setattr(timed_in_turn, "Worker", Worker)
    monkeypatch.setattr(timed_in_turn.subprocess, "check_output", lambda *_, **__: "abc\n")
    out = tmp_path / "against.json"
    options = ["--rounds", "3", "--cases", "0", "--out", str(out), "--fail-above", "1.1"]
    assert compare.main(["--timed", str(tmp_path), *options]) == 0
    text = capsys.readouterr().out
    assert " 0.500 (0.500 to 0.500) dilated_attention: forward_backward 1 -> 0.5; S=128" in text
    rows = json.loads(out.read_text())["rows"]
    assert [row["part"] for row in rows] == ["inference", "forward_backward"]
    assert [(row["ratio"], row["control_ratio"]) for row in rows] == [(2.0, 1.0)] * 2
