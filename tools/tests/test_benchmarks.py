"""The CPU benchmarks run: each on a size that takes no time."""

import json
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from tools.packages import ROOT

FOLDER = ROOT / "benchmarks"


@pytest.fixture(autouse=True)
def benchmarks(monkeypatch):
    """The scripts of benchmarks/ import each other by their plain names."""
    monkeypatch.syspath_prepend(str(FOLDER))


def test_every_script_can_be_imported():
    names = sorted(path.stem for path in FOLDER.glob("*.py"))
    assert len(names) > 10
    run = subprocess.run(
        [sys.executable, "-c", f"import {', '.join(names)}"],
        cwd=FOLDER,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr


def test_one_command_runs_every_benchmark_of_a_cpu():
    from run import COMMANDS, NEEDED, ONE_THREAD, QUICK, TRAINED

    scripts = {command[0] for command in COMMANDS.values()}
    assert all((FOLDER / script).is_file() for script in scripts)
    assert set(QUICK) | ONE_THREAD | set(NEEDED) <= set(COMMANDS)
    assert all(set(runs) <= set(TRAINED) for runs in NEEDED.values())
    no_benchmarks = {"run.py", "compare.py", "timed_in_turn.py", "harness.py", "peak_memory.py"}
    needs_other_code = {"slides_official.py"}
    cpu = {path.name for path in FOLDER.glob("*.py") if not path.name.startswith("gpu_")}
    assert cpu - no_benchmarks - needs_other_code == scripts


def test_a_benchmark_that_fails_does_not_stop_the_others(monkeypatch, tmp_path, capsys):
    import run

    started = []

    def start(command, env):
        started.append((command[1:], env.get("OMP_NUM_THREADS")))
        return SimpleNamespace(returncode=int("hilbert.py" in command[1]))

    monkeypatch.setattr(run, "subprocess", SimpleNamespace(run=start))
    monkeypatch.setattr(run, "RUNS", tmp_path)
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    assert run.main(["--only", "hilbert", "length", "context_gain"]) == 1
    assert "failed: hilbert\n" in capsys.readouterr().out
    hilbert, length, *trainings, scoring = started
    assert hilbert == ([str(FOLDER / "hilbert.py")], "1")
    assert length == ([str(FOLDER / "length.py")], "7")
    assert [command[:2] for command, _ in trainings] == [["-m", "dilated_models"]] * 7
    assert scoring[0] == [
        str(FOLDER / "context_gain.py"),
        *(str(tmp_path / r) for r in run.TRAINED),
    ]
    started.clear()
    (tmp_path / "copies-0").mkdir()
    (tmp_path / "copies-0" / "model.safetensors").touch()
    assert run.main(["--only", "adaptive_recall"]) == 0
    assert len(started) == 1
    started.clear()
    assert run.main(["--quick"]) == 0
    assert len(started) == len(run.QUICK)


def test_the_record_of_plain_training_is_the_median_of_the_runs_without_copies():
    import context_gain

    training = {"steps": 5, "batch_size": 1, "seq_len": 32, "warmup_copies": 0.0, "seed": 0}
    runs = [
        {
            "copied_steps": copied_steps,
            "model": {"d_model": 8},
            "training": training,
            "by_context": [
                {"context": 16, "bits_per_byte": bits},
                {"context": 32, "bits_per_byte": bits / 2},
            ],
        }
        for copied_steps, bits in ((0, 2.0), (3, 1.0), (0, 9.0), (0, 3.0))
    ]
    assert context_gain.plain_record(runs) == {
        "model": {"d_model": 8},
        "training": {"steps": 5, "batch_size": 1, "seq_len": 32},
        "by_context": [
            {"context": 16, "bits_per_byte": 3.0},
            {"context": 32, "bits_per_byte": 1.5},
        ],
    }


def test_what_context_gives_is_recorded_of_the_preset_that_users_run():
    import context_gain
    from dilated_models.training.config import PRESETS

    rows = json.loads(context_gain.RESULT.read_text())["rows"]
    record = json.loads(context_gain.RECORD.read_text())
    assert record == json.loads(json.dumps([context_gain.plain_record(rows)]))
    varied = {"warmup_copies", "seed"}
    for row in rows:
        for name, value in PRESETS["tiny"].training.items():
            assert row["training"][name] == value or name in varied, (row["run"], name)


@pytest.mark.parametrize("is_causal", [False, True])
def test_breakdown(monkeypatch, is_causal):
    import breakdown

    monkeypatch.setattr(breakdown, "SEQ_LEN", 1000)
    monkeypatch.setattr(breakdown, "ROUNDS", 1)
    with torch.no_grad():
        row = breakdown.measure(32, is_causal)
    assert all(seconds > 0 for seconds in row["seconds"].values())
    assert sum(row["share_of_call"].values()) == pytest.approx(1, abs=0.01)


def test_short_sequences(monkeypatch):
    import short_sequences

    monkeypatch.setattr(short_sequences, "ROUNDS", 1)
    row = short_sequences.measure(16, is_causal=True)
    assert row["forward_backward"]["dilated_s"] > 0


@pytest.mark.parametrize("is_causal", [False, True])
def test_block_sparse(is_causal):
    import block_sparse

    rows = block_sparse.measure(512, is_causal)
    assert len(rows) == len(block_sparse.RATIOS) * len(block_sparse.KINDS)
    for row in rows:
        assert row["forward"]["speed_up"] > 0
        assert abs(row["kept"] - row["sparsity_ratio"]) <= 2 / 8
        assert row["kept"] / 4 < row["mass"] <= 1


def test_block_sparse_chosen_by_content_keeps_the_mass():
    import block_sparse

    adaptive = block_sparse.measure_adaptive(1024)
    assert 0 < adaptive["selector_share_of_forward"] < 1
    (window,) = (
        row
        for row in block_sparse.measure(1024, True)
        if (row["pattern_type"], row["sparsity_ratio"]) == ("local_window", 0.1)
    )
    assert adaptive["mass"] > window["mass"]
    assert block_sparse.peak(1024, "sparse") >= 0


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_equal_flops(monkeypatch, dtype):
    import equal_flops

    monkeypatch.setattr(
        equal_flops, "peak_memory_in_fresh_process", lambda script, *options: list(options)
    )
    row = equal_flops.measure(512, 16, dtype, True, max_rounds=3, seconds=0)
    assert row["forward"]["ratio_to_windows"] > 0
    assert row["forward_peak"] == ["512", "16", dtype, "1"]


def test_dense_attention_is_extrapolated_from_the_longest_length_it_was_measured_at(monkeypatch):
    import length

    monkeypatch.setattr(length, "ROUNDS", 2)
    monkeypatch.setattr(length, "peak_memory_in_fresh_process", lambda *_: {"peak_bytes": 100})
    first = length.measure("forward_backward", 64, None)
    assert first["dilated"]["rounds"] == first["dense"]["rounds"] == 2
    assert not first["dense"]["extrapolated"]
    monkeypatch.setattr(length, "LONGEST_DENSE_S", 0)
    second = length.measure("forward_backward", 256, first)
    assert second["dilated"]["extrapolated"] is False
    assert second["dense"] == {
        "best_s": 16 * first["dense"]["best_s"],
        "peak_bytes": 400,
        "extrapolated": True,
        "from_seq_len": 64,
    }
    assert "dense extrapolated" in length.format_row(second)


def test_calls_take_turns_until_their_time_is_over(monkeypatch):
    import length

    clock, order = [0.0], []
    monkeypatch.setattr(length, "SECONDS", 12)
    monkeypatch.setattr(length.time, "perf_counter", lambda: clock[0])

    def call(name, seconds):
        order.append(name)
        clock[0] += seconds

    times = length.time_in_turn(
        {
            "short": lambda: call("short", 1),
            "long": lambda: call("long", 5),
            "longest": lambda: call("longest", 50),
        }
    )
    assert order[:5] == ["short", "long", "longest", "short", "long"]
    counted = {name: (time["rounds"], time["best_s"]) for name, time in times.items()}
    # Without the first run, unless that run alone is too long for another.
    assert counted == {"short": (length.ROUNDS, 1), "long": (2, 5), "longest": (1, 50)}


def test_peak_memory_is_above_the_inputs():
    run = subprocess.run(
        [sys.executable, str(FOLDER / "length.py"), "--peak", "dilated", "forward", "65536"],
        capture_output=True,
        text=True,
        check=True,
    )
    output_bytes = 65536 * 4 * 64 * 4
    assert output_bytes <= json.loads(run.stdout)["peak_bytes"] < 2 * output_bytes


def test_hilbert():
    import hilbert

    rows = hilbert.locality("square", hilbert.GRIDS["square"](), 64)
    assert rows["hilbert"] > rows["row_by_row"]
    times = hilbert.tile_orders(256, 64, is_causal=True, rounds=2)
    assert times["ratio"]["median"] > 0


def test_border_copies():
    import border_copies

    for name in ("shifted layers", "window of 64"):
        row = border_copies.measure(name, 0, steps=2)
        assert len(row["accuracy"]) == len(border_copies.DISTANCES) * len(border_copies.PLACES)
        assert all(0 <= part["accuracy"] <= 1 and part["tokens"] for part in row["accuracy"])
    shifted = border_copies.build("shifted layers", 0)
    tokens = torch.arange(160)[None] % 64
    changed = tokens.clone()
    changed[0, 127] = 0  # before a border that the second layer does not have
    assert not torch.equal(shifted(tokens)[0, 128], shifted(changed)[0, 128])
    plain = border_copies.build("LongNet", 0)
    for model in (shifted, plain):
        assert torch.equal(model(tokens)[0, :127], model(changed)[0, :127])


def test_generation():
    import generation

    rows = generation.measure(contexts=(64, 300), steps=33)
    assert [row["method"] for row in rows] == ["cache", "cache", "full forward"]
    assert all(row["token"]["median_cpu_s"] > 0 for row in rows)
    assert rows[2]["largest_difference_of_logits"] < 1e-4


@pytest.mark.parametrize("kind", ["embed", "train"])
def test_a_small_slide_is_checked_and_measured(monkeypatch, kind):
    import slides

    small = {"embed_dim": 16, "in_chans": 8, "num_heads": 4, "depth": 12}
    config_of = slides.config_of
    monkeypatch.setattr(slides, "config_of", lambda name, **o: config_of(name, **(small | o)))
    row = slides.measure(slides.FLASH, 50, kind)
    assert (row["tokens"], row["kind"], row["embed_dim"]) == (50, kind, 16)
    assert row["peak_memory_bytes"] > row["cpu_seconds"] >= 0
