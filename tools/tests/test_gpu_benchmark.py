"""The GPU benchmark and what it is checked with, on the CPU: the kernels run in the interpreter."""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import time
import tomllib
from pathlib import Path

import pytest
import torch
from dilated_core import DilatedPattern, reference_dilated_attention_with_lse

from tools.packages import ROOT

BROKEN = '''"""A backend that is 1 % off, and one that is 10 % off."""
from dilated_core.merge import AttentionOutput
from dilated_core.backends.sdpa import SdpaBackend


class Off(SdpaBackend):
    def __init__(self, name, factor):
        self.name, self.priority, self._factor = name, 1, factor

    def forward(self, *tensors, **options):
        out, lse = super().forward(*tensors, **options)
        return AttentionOutput(out * self._factor, lse)


a_little, a_lot = Off("a_little_off", 1.01), Off("a_lot_off", 1.1)
'''


@pytest.fixture
def benchmarks(monkeypatch):
    """The scripts of benchmarks/ import each other by their plain names."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))


def make_machine_without_our_packages(folder):
    """A Python that has what is installed here, except for the packages of this workspace."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    python = folder / "bin" / "python"
    ask = "import sysconfig; print(sysconfig.get_paths()['purelib'])"
    run = subprocess.run([python, "-c", ask], capture_output=True, text=True, check=True)
    for entry in Path(sysconfig.get_paths()["purelib"]).iterdir():
        if "dilated" not in entry.name and entry.suffix != ".pth":
            (Path(run.stdout.strip()) / entry.name).symlink_to(entry)
    gone = subprocess.run([python, "-c", "import dilated_core"], capture_output=True, text=True)
    assert "No module named 'dilated_core'" in gone.stderr
    return python


def copy_tree(root):
    """What a GPU box gets, with core and kernels and a package of wrong backends."""
    ignore = shutil.ignore_patterns("__pycache__", "results", "tests")
    for folder in ("tools", "benchmarks", "packages/dilated-core", "packages/dilated-kernels"):
        shutil.copytree(ROOT / folder, root / folder, ignore=ignore)
    shutil.copy(ROOT / "pyproject.toml", root)
    broken = root / "packages" / "dilated-broken"
    (broken / "src/dilated_broken").mkdir(parents=True)
    (broken / "src/dilated_broken/__init__.py").write_text(BROKEN)
    (broken / "pyproject.toml").write_text(
        '[project]\nname = "dilated-broken"\nversion = "0.1"\n'
        '[project.entry-points."dilated.backends"]\n'
        'a_little_off = "dilated_broken:a_little"\na_lot_off = "dilated_broken:a_lot"\n'
    )


def test_everything_runs_from_a_bare_tree_and_wrong_backends_are_named(tmp_path):
    """One run of the real phases, without a GPU and with nothing of ours installed."""
    python = make_machine_without_our_packages(tmp_path / "machine")
    root = tmp_path / "tree"
    copy_tree(root)
    environment = {name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ}
    environment |= {"OMP_NUM_THREADS": "1"}
    command = [
        *(str(python), "tools/gpu_check.py", "--device", "cpu", "--commit", "abc1234"),
        *("--only", "accuracy", "benchmark", "--json", "report.json", "--out", "out.json"),
    ]
    run = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True)
    print(run.stdout, run.stderr)
    report = json.loads((root / "report.json").read_text())
    assert run.returncode == 1
    assert report["is_complete"]
    assert not report["is_correct"]

    machine = report["environment"]
    core = tomllib.loads((ROOT / "packages/dilated-core/pyproject.toml").read_text())["project"]
    assert machine["dilated-core"] == core["version"]
    assert machine["dilated-broken"] == "0.1"
    assert machine["commit"] == "abc1234"
    assert machine["ceilings"]["copy_tb_per_s"] > 0

    wrong = {"a_little_off", "a_lot_off"}
    right = {"triton", "triton_hilbert", "sdpa"}
    rows = report["phases"]["accuracy"]["rows"]
    assert {row["backend"] for row in rows} >= right | wrong
    for row in rows:
        if row["backend"] in wrong:
            assert row["problems"][0].startswith("out: relative error")
        if row["backend"] in right:
            assert not row["problems"], row
            assert set(row["errors"]) >= {"out", "lse", "dq"}
    # dk and dv of grouped heads are compared as a whole, not in a few drawn places.
    assert all(set(row["errors"]) == {"out", "lse", "dq", "dk", "dv"} for row in rows)

    (row,) = report["phases"]["benchmark"]["rows"]
    contenders = row["contenders"]
    assert "wrong result" in contenders["a_lot_off"]["failed"]
    assert "forward" not in contenders["a_lot_off"]
    timed = right | {"auto", "dense_flash", "windows_flash", "square_flash"}
    timed |= {"gather_flash", "gather_triton"}
    for name in timed:
        for part in ("forward", "forward_backward"):
            spread = contenders[name][part]
            assert 0 < spread["low_ms"] <= spread["median_ms"] <= spread["high_ms"]
            assert spread["rounds"] >= 3
            assert spread["tflops"] > 0
    for name in right | {"auto", "gather_triton"}:
        assert max(contenders[name]["errors"].values()) < 1e-5
        assert set(contenders[name]["errors"]) == {"out", "lse", "dq", "dk", "dv"}
    assert contenders["gather_flash"]["errors"]["out"] < 1e-5
    for part, factor in (("forward", 1.0), ("forward_backward", 3.5)):
        spread = contenders["sdpa"][part]
        rate = factor * row["forward_flops"] / (spread["median_ms"] * 1e9)
        assert spread["tflops"] == pytest.approx(rate, rel=2e-3)
    ratio = row["ratios"]["forward"]["sdpa"]["speed"]
    both = contenders["sdpa"]["forward"], contenders["triton"]["forward"]
    assert ratio == pytest.approx(both[0]["median_ms"] / both[1]["median_ms"], rel=0.01, abs=1e-3)
    assert json.loads((root / "out.json").read_text())["rows"] == [row]

    found = [text for phase in report["phases"].values() for text in phase["problems"]]
    assert {name for name in wrong | right if any(repr(name) in text for text in found)} == wrong
    assert any(text.startswith("backend 'a_lot_off', S=32 w0=16: wrong") for text in found)


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("num_kv_heads", [4, 2])
def test_drawn_positions_agree_with_the_oracle(benchmarks, is_causal, num_kv_heads):
    from gpu_oracle import Call, sampled_errors

    torch.manual_seed(0)
    pattern = DilatedPattern([10, 24, 70], [2, 3, 5], head_offsets="blocked")  # leaves rows empty
    q = torch.randn(1, 61, 4, 8, dtype=torch.float64, requires_grad=True)
    k, v = (
        torch.randn(1, 61, num_kv_heads, 8, dtype=torch.float64, requires_grad=True)
        for _ in range(2)
    )
    dout = torch.randn_like(q)
    out, lse = reference_dilated_attention_with_lse(q, k, v, pattern, is_causal=is_causal)
    dq, dk, dv = torch.autograd.grad(out, (q, k, v), dout)
    assert (lse == -torch.inf).any()
    call = Call(q, k, v, dout, out.detach(), lse.detach(), dq, dk, dv)
    errors = sampled_errors(call, pattern, is_causal=is_causal, num_heads=4)
    names = {"out", "lse", "dq", "dk", "dv"} if num_kv_heads == 4 else {"out", "lse", "dq"}
    assert set(errors) == names
    assert max(errors.values()) < 1e-12
    for name in names:
        wrong = getattr(call, name) * 1.001
        errors = sampled_errors(call._replace(**{name: wrong}), pattern, is_causal=is_causal)
        assert errors[name] == pytest.approx(1e-3, rel=1e-6)
        # A row that should be empty and is not.
        if name == "lse":
            filled = lse.detach().masked_fill(lse == -torch.inf, -5.0)
            errors = sampled_errors(call._replace(lse=filled), pattern, is_causal=is_causal)
            assert not errors["lse"] < 1
    with pytest.raises(ValueError, match="zero keys are not part"):
        sampled_errors(call, DilatedPattern([8], [1], padding="attended"), is_causal=is_causal)


@pytest.mark.parametrize("is_causal", [False, True])
def test_peers_get_the_flops_of_the_pattern(benchmarks, is_causal):
    from gpu_contenders import dense_contenders

    pattern = DilatedPattern([256, 512, 1024], [1, 2, 4])
    shape = (1, 4096, 4, 64)
    flops = pattern.flops(4096, 4, 64, is_causal=is_causal)
    found = dense_contenders(torch.device("cuda"), shape, 256, is_causal, flops)
    assert len(found) == 6
    for name, contender in found.items():
        B, S, H, D = contender.shape or shape
        dense = DilatedPattern([S], [1]).flops(S, H, D, batch_size=B, is_causal=is_causal)
        assert contender.flops == dense
        if not name.startswith("dense"):
            assert contender.flops == pytest.approx(flops, rel=0.15)
        if name.startswith("square"):
            assert S % 128 == 0


def test_times_are_those_of_one_call(benchmarks):
    from gpu_timing import time_in_rounds

    calls = {"short": lambda _: time.sleep(4e-4), "long": lambda _: time.sleep(8e-3)}
    spreads = time_in_rounds(calls, torch.device("cpu"), seconds=0.2)
    assert spreads["short"]["calls_per_round"] > 1
    assert spreads["long"]["calls_per_round"] == 1
    assert spreads["short"]["rounds"] == spreads["long"]["rounds"] >= 3
    assert 0.4 <= spreads["short"]["low_ms"] <= spreads["short"]["high_ms"]
    assert 8.0 <= spreads["long"]["low_ms"] < 40.0
    # Other programs make sleep longer, hardly five times as long in the quietest round.
    assert spreads["short"]["low_ms"] < 2.0


def test_cases_of_the_benchmark(benchmarks):
    from gpu_attention import CASES, QUICK_CASES

    assert len(set(CASES)) == len(CASES)
    assert set(QUICK_CASES) <= set(CASES)
    assert {case.seq_len for case in CASES} >= {2**i for i in range(13, 23)} - {2**14}
    assert {case.head_dim for case in CASES} == {64, 128}
    assert {case.num_heads for case in CASES} == {12, 16}
    for case in CASES:
        pattern = case.pattern()
        assert pattern.segment_lengths[0] == case.w0
        assert max(pattern.segment_lengths) <= case.seq_len
        if not case.is_paper:
            assert 2 * max(pattern.segment_lengths) > case.seq_len


@pytest.mark.parametrize("count", [1, 2, 6])
def test_processes_share_the_cases_of_accuracy(benchmarks, count):
    from gpu_accuracy import gpu_cases, my_share

    cases = gpu_cases()
    shares = [my_share(cases, f"{i}/{count}") for i in range(count)]
    assert sorted(case.name for share in shares for case in share) == sorted(
        case.name for case in cases
    )
    if count > 1:  # the longest sequences take turns with the memory
        assert {case.how for case in shares[0]} == {"drawn"}
        assert {case.how for share in shares[1:] for case in share} == {"whole"}
    assert any(case.seq_len * case.num_heads * case.head_dim > 2**31 for case in cases)
    assert any(case.pattern.padding == "attended" for case in cases)
    assert len({case.name for case in cases}) == len(cases)


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


PARTS = ("forward", "forward_backward")


def verdicts(rows):
    from gpu_goals import goals, ratios

    rows = [{**row, "ratios": ratios(row)} for row in rows]
    return {goal["goal"]: (goal["met"], goal["evidence"]) for goal in goals(rows)}


def pick(found, *words):
    (verdict,) = [v for goal, v in found.items() if all(word in goal for word in words)]
    return verdict


def test_goals_say_yes_no_or_not_measured(benchmarks):
    good = [
        row(2**13, dense_flash=(9.0, 400.0), gather_flash=(3.0, 100.0)),
        row(2**17, ms=10.0),
        row(2**22, ms=340.0),
    ]
    found = verdicts(good)
    assert pick(found, "forward >=", "of dense_flash")[0] == "yes"
    assert pick(found, "forward_backward >=", "of dense_flash")[0] == "yes"
    assert pick(found, "forward >=", "of dense_cudnn")[0] == "not measured"
    assert pick(found, "forward >=", "gather")[0] == "yes"
    assert pick(found, "memory")[0] == "yes"
    assert pick(found, "forward latency linear")[0] == "yes"
    assert pick(found, "forward never slower than dense_flash")[0] == "yes"
    assert {met for met, _ in verdicts([]).values()} == {"not measured"}
    on_cpu = [{**row, "device": "cpu"} for row in good]
    assert {met for met, _ in verdicts(on_cpu).values()} == {"not measured"}


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        (row(2**13, dense_flash=(9.0, 401.0)), ("forward >=", "of dense_flash")),
        (row(2**13, windows_cudnn=(9.0, 470.0)), ("forward_backward >=", "of windows_cudnn")),
        (row(2**13, gather_flash=(2.99, 100.0)), ("forward >=", "gather")),
        (row(2**13, peak=101), ("memory",)),
        (row(2**22, ms=360.0), ("forward latency linear",)),
        (row(2**13, dense_cudnn=(0.99, 400.0)), ("forward never slower than dense_cudnn",)),
        (
            row(2**13, auto=(1.2, 300.0), dense_cudnn=(1.1, 400.0)),
            ("forward never slower than dense_cudnn",),
        ),
    ],
)
def test_one_bad_row_is_enough_for_no(benchmarks, bad, words):
    good = row(
        2**17,
        ms=10.0,
        dense_flash=(90.0, 400.0),
        dense_cudnn=(90.0, 400.0),
        windows_cudnn=(90.0, 400.0),
        gather_flash=(30.0, 100.0),
    )
    met, evidence = pick(verdicts([good, bad]), *words)
    assert met == "no", evidence
    only_small = pick(
        verdicts([row(2**11, w0=512, dense_flash=(9.0, 900.0))]), "forward >=", "flash", "dense"
    )
    assert only_small[0] == "not measured"  # that goal is about w0 = 2048


def test_an_auto_that_is_faster_than_the_fused_kernels_is_what_counts(benchmarks):
    slow = row(2**11, ms=1.2, auto=(1.0, 400.0), dense_cudnn=(1.1, 400.0))
    assert pick(verdicts([slow]), "forward never slower than dense_cudnn")[0] == "yes"


def test_write_json_replaces_whole_files(benchmarks, tmp_path):
    from gpu_timing import write_json

    path = tmp_path / "a" / "b.json"
    write_json(path, {"rows": [1]})
    with pytest.raises(TypeError):
        write_json(path, {"rows": object()})
    assert json.loads(path.read_text()) == {"rows": [1]}
    assert [file.name for file in path.parent.iterdir()] == ["b.json"]
