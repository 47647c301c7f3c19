"""The command for a machine with a GPU, without one: phases, limits of time, exit codes, report."""

import json
import os
import shutil
import signal
import subprocess
import sys
import sysconfig
import time
import tomllib
from pathlib import Path

import pytest

from tools.packages import ROOT

MACHINE = '{"gpu": "a GPU", "torch": "2", "ceilings": {}}'
ROW = {
    "seq_len": 8192,
    "w0": 2048,
    "contenders": {
        "triton": {},
        "odd": {"failed": "wrong result"},
        "dense_cudnn": {"failed": "no plan"},  # a fact about the machine
    },
}
WRITE = "import sys\npath = next(a[7:] for a in sys.argv if a.startswith('--json='))\n"
BROKEN = '''"""A backend that is 10 % off."""
from dilated_core.backends.sdpa import SdpaBackend
from dilated_core.merge import AttentionOutput


class Off(SdpaBackend):
    name, priority = "off", 1

    def forward(self, *arguments):
        out, lse = super().forward(*arguments)
        return AttentionOutput(out * 1.1, lse)


off = Off()
'''


@pytest.fixture
def tree(tmp_path):
    """A bare tree with one package whose test passes, and with stand-ins for the benchmarks."""
    root = tmp_path / "tree"
    shutil.copytree(ROOT / "tools", root / "tools", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", root)
    package = root / "packages" / "dilated-one"
    (package / "src/dilated_one").mkdir(parents=True)
    (package / "src/dilated_one/__init__.py").touch()
    (package / "tests").mkdir()
    (package / "pyproject.toml").write_text('[project]\nname = "dilated-one"\nversion = "0.1"\n')
    add_test(root, "good", "def test_good():\n    import dilated_one")
    (root / "benchmarks").mkdir()
    replace(root, "gpu_machine", f"open(path, 'w').write({MACHINE!r})")
    for script in ("gpu_attention", "gpu_block_sparse"):
        replace(root, script, "import json\nopen(path, 'w').write(json.dumps({'rows': []}))")
    return root


def replace(root, script, code):
    (root / "benchmarks" / f"{script}.py").write_text(WRITE + code)


def add_test(root, name, code):
    path = root / "packages/dilated-one/tests" / f"test_{name}.py"
    path.write_text(f"import os, pytest, time\n\n@pytest.mark.gpu\n{code}\n")


def command(root, *arguments):
    return [
        *(sys.executable, str(root / "tools/gpu_check.py"), "--json", str(root / "report.json")),
        *("--out", str(root / "out.json"), "--processes", "1", *arguments),
    ]


def check(root, *arguments, environment=None):
    """Exit code, report and output of the command."""
    run = subprocess.run(
        command(root, *arguments), capture_output=True, text=True, cwd=root.parent, env=environment
    )
    report = root / "report.json"
    print(run.stdout, run.stderr)
    return run.returncode, json.loads(report.read_text()) if report.exists() else None, run.stdout


def test_all_phases_and_a_report(tree):
    before = sorted(tree.rglob("*"))
    code, report, output = check(tree)
    assert code == 0
    assert report["is_complete"]
    assert report["is_correct"]
    assert report["environment"]["gpu"] == "a GPU"
    assert report["tests"]["passed"] == 1
    assert output.splitlines()[-1].startswith("RESULT: all results are right")
    # The tree is left as it was: no caches, no installation.
    assert {path.name for path in {*tree.rglob("*")} - {*before}} == {"report.json"}


def test_one_failure_hides_no_other(tree):
    add_test(tree, "bad", "def test_bad():\n    assert 2 + 2 == 5, 'arithmetic'")
    add_test(tree, "broken", "def test_broken(:")
    add_test(tree, "crash", "def test_crash():\n    os.abort()")
    add_test(tree, "hangs", "def test_hangs():\n    time.sleep(600)")
    replace(
        tree,
        "gpu_attention",
        f"import json\nopen(path, 'w').write(json.dumps({{'rows': [{ROW}]}}))\n"
        "raise SystemExit('the device is lost')",
    )
    started = time.monotonic()
    code, report, output = check(tree, "--seconds", "120", "--only", "tests", "benchmark")
    assert time.monotonic() - started < 500  # a test sleeps for 600
    assert code == 1
    assert report["is_complete"]
    assert not report["is_correct"]
    assert report["tests"]["passed"] == 1
    assert json.loads((tree / "out.json").read_text())["rows"] == [ROW]
    for words in (
        *("test_bad: AssertionError: arithmetic", "test_broken", "crashed while running"),
        *("test_hangs", "backend 'odd', S=8192 w0=2048: wrong result"),
        "gpu_attention.py ended with code 1",
    ):
        assert any(words in problem for problem in report["problems"]), words
    assert not any("dense_cudnn" in problem for problem in report["problems"])
    for problem in report["problems"]:
        assert f"PROBLEM: {problem[:80]}" in output


def test_a_run_that_is_stopped_leaves_its_report_and_no_process(tree):
    replace(tree, "gpu_attention", "import os, time\nprint('pid', os.getpid())\ntime.sleep(600)")
    process = subprocess.Popen(command(tree), stdout=subprocess.PIPE)
    with process.stdout as lines:
        pid = next(int(line.split()[-1]) for line in lines if line.startswith(b"pid"))
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=300) == 128 + signal.SIGTERM
    assert not os.path.exists(f"/proc/{pid}")
    report = json.loads((tree / "report.json").read_text())
    assert report["tests"]["passed"] == 1
    assert not report["is_complete"]


def test_nothing_tested_is_a_problem_and_the_sanitizer_checks_twice(tree, tmp_path):
    (tree / "packages/dilated-one/tests/test_good.py").unlink()
    tool = tmp_path / "bin" / "compute-sanitizer"
    tool.parent.mkdir()
    tool.write_text(
        '#!/bin/sh\necho "$@" pool=$PYTORCH_NO_CUDA_MEMORY_CACHING\n[ $2 = memcheck ] || exit 99\n'
    )
    tool.chmod(0o755)
    environment = {**os.environ, "PATH": f"{tool.parent}{os.pathsep}{os.environ['PATH']}"}
    code, report, output = check(tree, "--sanitizer", "--only", "tests", environment=environment)
    assert code == 1
    assert "--tool memcheck --error-exitcode 99" in output
    assert "pool=1" in output
    nothing, racecheck = report["problems"]
    assert nothing == "no test passed, so nothing is known to be right"
    assert racecheck.startswith("racecheck: ")


def test_without_a_gpu_one_line_and_exit_code_2(tree):
    replace(tree, "gpu_machine", "")
    code, _, output = check(tree)
    assert code == 2
    assert output.splitlines()[-1].startswith("no CUDA device is visible to PyTorch")


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


def test_everything_runs_from_a_bare_tree_and_a_wrong_backend_is_named(tmp_path):
    """One run of the real phases, without a GPU and with nothing of ours installed."""
    python = make_machine_without_our_packages(tmp_path / "machine")
    root = tmp_path / "tree"
    ignore = shutil.ignore_patterns("__pycache__", "results")
    packages = [f"packages/dilated-{name}" for name in ("core", "kernels", "sparse")]
    for folder in ("tools", "benchmarks", *packages):
        shutil.copytree(ROOT / folder, root / folder, ignore=ignore)
    shutil.copy(ROOT / "pyproject.toml", root)
    broken = root / "packages" / "dilated-broken"
    (broken / "src/dilated_broken").mkdir(parents=True)
    (broken / "src/dilated_broken/__init__.py").write_text(BROKEN)
    (broken / "pyproject.toml").write_text(
        '[project]\nname = "dilated-broken"\nversion = "0.1"\n'
        '[project.entry-points."dilated.backends"]\noff = "dilated_broken:off"\n'
    )
    environment = {name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ}
    run = subprocess.run(
        [
            *(str(python), "tools/gpu_check.py", "--device", "cpu", "--commit", "abc1234"),
            *("--json", "report.json", "--out", "out.json", "--processes", "1"),
        ],
        cwd=root,
        env=environment | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    print(run.stdout, run.stderr)
    report = json.loads((root / "report.json").read_text())
    assert run.returncode == 1
    assert report["is_complete"]
    (problem,) = report["problems"]
    assert problem.startswith("backend 'off', S=32 w0=16: wrong result")

    machine = report["environment"]
    core = tomllib.loads((ROOT / "packages/dilated-core/pyproject.toml").read_text())["project"]
    assert (machine["dilated-core"], machine["dilated-broken"]) == (core["version"], "0.1")
    assert machine["commit"] == "abc1234"
    assert machine["ceilings"]["copy_tb_per_s"] > 0
    assert report["tests"]["passed"] == 4
    assert len(report["tests"]["errors"]) == 4

    (row,) = report["blocks"]["rows"]
    for name in ("dense", "triton", "sdpa"):
        assert row["contenders"][name]["forward_backward"]["median_ms"] > 0
    (row,) = report["benchmark"]["rows"]
    contenders = row["contenders"]
    assert "forward" not in contenders["off"]
    right = {"triton", "triton_hilbert", "sdpa", "auto"}
    for name in right | {"dense_flash", "windows_flash", "gather_flash"}:
        for part in ("forward", "forward_backward"):
            spread = contenders[name][part]
            assert 0 < spread["low_ms"] <= spread["median_ms"] <= spread["high_ms"]
            assert spread["runs"] >= 3
    for name in right:
        assert max(contenders[name]["errors"].values()) < 1e-5
        assert set(contenders[name]["errors"]) == {"out", "lse", "dq", "dk", "dv"}
    for part, factor in (("forward", 1.0), ("forward_backward", 3.5)):
        spread = contenders["sdpa"][part]
        rate = factor * row["forward_flops"] / (spread["median_ms"] * 1e9)
        assert spread["tflops"] == pytest.approx(rate, rel=2e-3)
    out = json.loads((root / "out.json").read_text())
    assert out["rows"] == [row]
    assert out["environment"] == machine

    sizes = ["--head-dim", "16", "--dtype", "float32", "--seq-len", "32", "--w0", "16"]
    search = ["--kinds", "dq", "--causal", "1", "--configs", "16,32,4,1", "--workers", "0"]
    tune = ["--json", "tiles.json", "--tune", *sizes, "--num-heads", "1", *search]
    subprocess.run(
        [str(python), "tools/gpu_check.py", "--device", "cpu", *tune],
        cwd=root,
        env=environment,
        check=True,
    )
    (found,) = json.loads((root / "tiles.json").read_text())["rows"]
    assert (found["kind"], found["config"]) == ("dq", [16, 32, 4, 1])
    assert found["gain"] > 0
