"""Processes side by side: their output, their ends, and the deadline."""

import os
import sys
import time

import pytest

from tools.gpu_jobs import Job, run_jobs


def job(tmp_path, name, code):
    return Job(name, [sys.executable, "-uc", code], dict(os.environ), tmp_path)


def run(jobs, seconds=30.0):
    shown = []
    outcomes = run_jobs(jobs, seconds=seconds, show=shown.append, each_tick=lambda: None)
    return {outcome.name: outcome for outcome in outcomes}, shown


def test_outcomes_tell_how_each_ended(tmp_path):
    outcomes, shown = run(
        [
            job(tmp_path, "good", "print('fine')"),
            job(tmp_path, "bad", "print('before'); raise SystemExit('no such thing')"),
        ]
    )
    assert outcomes["good"].exit_code == 0
    assert outcomes["good"].problem is None
    assert outcomes["bad"].problem == "bad ended with code 1; last output: no such thing"
    assert sorted(shown) == ["bad | before", "bad | no such thing", "good | fine"]


def test_what_runs_at_the_deadline_is_killed_with_its_children(tmp_path):
    started = time.monotonic()
    code = (
        "import subprocess, sys, time\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])\n"
        "print(child.pid)\n"
        "time.sleep(60)"
    )
    outcomes, shown = run(
        [job(tmp_path, "hangs", code), job(tmp_path, "ends", "print('done')")], seconds=2
    )
    assert time.monotonic() - started < 20
    assert outcomes["ends"].exit_code == 0
    assert outcomes["hangs"].exit_code is None
    assert "hangs was cut off after" in outcomes["hangs"].problem
    child = int(next(line for line in shown if line.startswith("hangs")).split("| ")[1])
    time.sleep(0.2)
    assert not os.path.exists(f"/proc/{child}") or "Z" in _state(child)


def _state(pid):
    with open(f"/proc/{pid}/stat") as file:
        return file.read().rsplit(")", 1)[1].split()[0]


def test_an_interruption_ends_the_processes(tmp_path):
    shown = []

    def interrupt():
        if shown:
            raise SystemExit(143)

    with pytest.raises(SystemExit):
        run_jobs(
            [job(tmp_path, "long", "import os, time; print(os.getpid()); time.sleep(60)")],
            seconds=60,
            show=shown.append,
            each_tick=interrupt,
        )
    pid = int(shown[0].split("| ")[1])
    assert not os.path.exists(f"/proc/{pid}")
