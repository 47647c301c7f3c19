"""The command itself: phases, deadlines, exit codes, the report. Benchmarks are stand-ins here;
test_gpu_benchmark.py runs the real ones."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest

from tools.bare_tree import package_folders
from tools.packages import ROOT

WRITE = """
import json, sys, time
from pathlib import Path
path = next(a.removeprefix("--json=") for a in sys.argv if a.startswith("--json="))
def write(**result):
    Path(path).write_text(json.dumps(result))
"""
MACHINE = 'write(environment={"gpu": "a GPU", "torch": "2", "triton": "3"}, complete=True)'
ACCURACY = """write(
    rows=[{"case": "16k", "backend": "good", "errors": {"out": 1e-3}, "problems": []}],
    complete=True,
)"""
ROW = {
    "seq_len": 8192,
    "w0": 2048,
    "num_heads": 12,
    "head_dim": 64,
    "is_causal": True,
    "is_paper": False,
    "memory_goal_bytes": 100,
    "contenders": {"triton": {"forward": {"tflops": 321.0, "peak_bytes": 90}}},
    "ratios": {"forward": {"dense_flash": {"rate": 0.8, "speed": 4.0}}},
}
BENCHMARK = f"write(rows=[{ROW}], goals=[], complete=True)"


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
    replace(root, "gpu_machine", MACHINE)
    replace(root, "gpu_accuracy", ACCURACY)
    replace(root, "gpu_attention", BENCHMARK)
    return root


def replace(root, script, code):
    (root / "benchmarks" / f"{script}.py").write_text(WRITE + code)


def add_test(root, name, code):
    path = root / "packages/dilated-one/tests" / f"test_{name}.py"
    path.write_text(f"import pytest, time, warnings\n\n@pytest.mark.gpu\n{code}\n")


def command(root, *arguments):
    return [
        *(sys.executable, str(root / "tools/gpu_check.py"), "--json", str(root / "report.json")),
        *("--out", str(root / "out.json"), "--processes", "1", *arguments),
    ]


def check(root, *arguments, environment=None):
    """Exit code, report and output of the command."""
    run = subprocess.run(
        command(root, *arguments),
        capture_output=True,
        text=True,
        cwd=root.parent,
        env=environment or dict(os.environ),
    )
    report = root / "report.json"
    print(run.stdout, run.stderr)
    return run.returncode, json.loads(report.read_text()) if report.exists() else None, run.stdout


def problems(report):
    return [problem for phase in report["phases"].values() for problem in phase["problems"]]


def test_all_phases_and_a_report(tree):
    before = sorted(tree.rglob("*"))
    code, report, output = check(tree)
    assert code == 0
    assert report["gpu_check"] == 1
    assert report["is_complete"]
    assert report["is_correct"]
    assert report["environment"]["gpu"] == "a GPU"
    assert list(report["phases"]) == ["environment", "tests", "accuracy", "benchmark"]
    assert report["phases"]["tests"]["packages"]["dilated-one"]["passed"] == 1
    assert report["phases"]["accuracy"]["rows"][0]["backend"] == "good"
    assert report["phases"]["benchmark"]["rows"] == [ROW]
    assert json.loads((tree / "out.json").read_text())["rows"] == [ROW]
    last = output.splitlines()[-12:]
    assert any(line.startswith("8192 2048 12x64 causal | 321/- | 0.80/-") for line in last)
    assert last[-2].startswith("RESULT: all results are right")
    # The tree is left as it was: no caches, no installation.
    added = {path.name for path in set(tree.rglob("*")) - set(before)}
    assert added == {"report.json", "out.json"}


def test_one_failure_hides_no_other(tree):
    add_test(tree, "bad", "def test_bad():\n    assert 2 + 2 == 5, 'arithmetic'")
    add_test(tree, "broken", "def test_broken(:")
    add_test(tree, "needy", "def test_needy(): pass\n\nimport no_such_module")
    add_test(tree, "warns", "def test_warns():\n    warnings.warn('old', DeprecationWarning)")
    add_test(
        tree,
        "torn",
        "def test_torn(late): pass\n\n@pytest.fixture\ndef late():\n    yield\n    1 / 0",
    )
    replace(
        tree,
        "gpu_accuracy",
        ACCURACY.replace('"problems": []', '"problems": ["out: too far"]').replace("good", "bent"),
    )
    replace(
        tree,
        "gpu_attention",
        "write(rows=[{'seq_len': 9, 'w0': 3, 'num_heads': 1, 'head_dim': 1, 'is_causal': False,"
        " 'is_paper': False, 'ratios': {}, 'memory_goal_bytes': 1, 'contenders':"
        " {'odd': {'failed': 'wrong result'}, 'dense_cudnn': {'failed': 'no plan'}}}])\n"
        "raise SystemExit('the device is lost')",
    )
    code, report, output = check(tree)
    assert code == 1
    assert report["is_complete"]
    assert not report["is_correct"]
    found = problems(report)
    assert any("test_bad.py::test_bad: AssertionError: arithmetic" in text for text in found)
    assert any("not collected" in text and "test_broken.py" in text for text in found)
    assert any("test_torn.py::test_torn: ZeroDivisionError" in text for text in found)
    assert "backend 'bent', 16k: out: too far" in found
    assert "backend 'odd', S=9 w0=3: wrong result" in found
    lost = "gpu_attention ended with code 1; last output: the device is lost"
    assert lost in found
    assert len(found) == 6  # PyTorch's own kernels may fail, modules may be missing, warnings come
    for problem in found:
        assert f"PROBLEM: {problem}" in output
    tests = report["phases"]["tests"]["packages"]["dilated-one"]
    assert tests["passed"] == 2
    assert list(tests["missing"]) == ["packages/dilated-one/tests/test_needy.py"]
    assert tests["warnings"] == ["DeprecationWarning: old"]


def test_what_hangs_is_cut_off_and_named(tree):
    add_test(tree, "hangs", "def test_hangs():\n    time.sleep(600)")
    add_test(tree, "later", "def test_later():\n    pass")
    replace(tree, "gpu_attention", f"write(rows=[{ROW}], goals=[])\ntime.sleep(600)")
    started = time.monotonic()
    code, report, _ = check(tree, "--seconds", "14")
    assert time.monotonic() - started < 40
    assert code == 1
    tests = report["phases"]["tests"]["packages"]["dilated-one"]
    hanging = "packages/dilated-one/tests/test_hangs.py::test_hangs"
    assert list(tests["cut_off"]) == [hanging]
    assert (tests["passed"], tests["not_reached"]) == (1, 1)
    found = problems(report)
    assert f"dilated-one: cut off: {hanging}: was running at the end" in found
    assert "dilated-one: 1 tests were not reached" in found
    assert any(text.startswith("dilated-one 1/1 was cut off after") for text in found)
    assert any(text.startswith("gpu_attention was cut off after") for text in found)
    # What was measured before is kept.
    assert report["phases"]["benchmark"]["rows"] == [ROW]
    assert json.loads((tree / "out.json").read_text())["rows"] == [ROW]


def test_a_run_that_is_stopped_leaves_its_report_and_no_process(tree):
    replace(
        tree,
        "gpu_attention",
        f"import os\nprint('pid', os.getpid())\nwrite(rows=[{ROW}], goals=[])\ntime.sleep(600)",
    )
    process = subprocess.Popen(command(tree, "--only", "benchmark"), stdout=subprocess.PIPE)
    with process.stdout as lines:
        pid = next(int(line.split()[-1]) for line in lines if b"| pid" in line)
        time.sleep(1.5)
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=20) == 128 + signal.SIGTERM
    assert not os.path.exists(f"/proc/{pid}")
    report = json.loads((tree / "report.json").read_text())
    assert report["phases"]["benchmark"]["rows"] == [ROW]
    assert not report["is_complete"]


def test_a_crash_is_a_problem(tree):
    add_test(tree, "crash", "def test_crash():\n    import os\n    os.abort()")
    code, report, _ = check(tree, "--only", "tests")
    assert code == 1
    assert any("test_crash: was running at the end" in text for text in problems(report))
    assert any("dilated-one 1/1 ended with code -6" in text for text in problems(report))
    (tree / "packages/dilated-one/tests/test_crash.py").unlink()
    (tree / "packages/dilated-one/tests/conftest.py").write_text("raise OSError('no conftest')\n")
    code, report, _ = check(tree, "--only", "tests")
    assert code == 1
    assert any("no conftest" in text for text in problems(report))


def test_nothing_tested_is_a_problem(tree):
    (tree / "packages/dilated-one/tests/test_good.py").unlink()
    code, report, _ = check(tree, "--only", "tests")
    assert (code, problems(report)) == (1, ["no test passed, so nothing is known to be right"])
    replace(tree, "gpu_accuracy", "write(rows=[], complete=True)")
    code, report, _ = check(tree, "--only", "accuracy")
    assert (code, problems(report)) == (1, ["no backend was compared with anything"])
    replace(tree, "gpu_accuracy", ACCURACY.replace("complete=True", "cases=7"))
    code, report, _ = check(tree, "--only", "accuracy")
    assert (code, problems(report)) == (1, ["gpu_accuracy.py ended before its work was done"])


def test_shares_of_the_tests_add_up(tree):
    many = "@pytest.mark.parametrize('i', range(11))\ndef test_many(i):\n    assert i != 5"
    add_test(tree, "many", many)
    code, report, _ = check(tree, "--only", "tests", "--processes", "2")
    assert code == 1
    tests = report["phases"]["tests"]["packages"]["dilated-one"]
    assert (tests["passed"], tests["not_reached"]) == (11, 0)
    assert list(tests["failed"]) == ["packages/dilated-one/tests/test_many.py::test_many[5]"]


def test_rows_of_several_processes_come_together(tree):
    script = """share = sys.argv[1]
row = {"case": share, "backend": "good", "errors": {}, "problems": []}
write(rows=[row], complete=share != "--share=1/3")
"""
    replace(tree, "gpu_accuracy", script)
    code, report, _ = check(tree, "--only", "accuracy", "--processes", "3")
    rows = report["phases"]["accuracy"]["rows"]
    assert [row["case"] for row in rows] == [f"--share={i}/3" for i in range(3)]
    assert (code, problems(report)) == (1, ["gpu_accuracy.py ended before its work was done"])


def test_without_a_gpu_one_line_and_exit_code_2(tree):
    replace(tree, "gpu_machine", "write(environment=None, complete=True)")
    code, report, output = check(tree)
    assert code == 2
    assert output.splitlines()[-1].startswith("no CUDA device is visible to PyTorch")
    assert list(report["phases"]) == ["environment"]


def test_sanitizer_runs_both_checks(tree, tmp_path):
    folder = tmp_path / "bin"
    folder.mkdir()
    tool = folder / "compute-sanitizer"
    tool.write_text(
        '#!/bin/sh\necho "$@" pool=$PYTORCH_NO_CUDA_MEMORY_CACHING\n[ $2 = memcheck ] || exit 99\n'
    )
    tool.chmod(0o755)
    environment = {**os.environ, "PATH": f"{folder}{os.pathsep}{os.environ['PATH']}"}
    code, report, _ = check(tree, "--sanitizer", "--only", "accuracy", environment=environment)
    phase = report["phases"]["sanitizer"]
    assert code == 1
    assert [phase[tool]["exit_code"] for tool in ("memcheck", "racecheck")] == [0, 99]
    (line,) = phase["memcheck"]["tail"]
    assert line.startswith("--tool memcheck --error-exitcode 99")
    assert "gpu_accuracy.py --tiny" in line
    assert line.endswith("pool=1")
    (problem,) = problems(report)
    assert problem.startswith("racecheck ended with code 99")
    environment["PATH"] = os.path.dirname(shutil.which("sh"))
    if shutil.which("compute-sanitizer", path=environment["PATH"]) is None:
        _, report, _ = check(tree, "--sanitizer", "--only", "accuracy", environment=environment)
        assert problems(report) == ["compute-sanitizer is not on the PATH"]


def test_every_package_of_this_tree_is_covered():
    assert {folder.name for folder in package_folders(ROOT)} >= {"dilated-core", "dilated-kernels"}
