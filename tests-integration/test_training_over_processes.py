"""The example that the READMEs start with torchrun: it learns, and survives the death of a process.

A process is killed (SIGKILL) at a step drawn at random. torchrun starts all of them again from the
last checkpoint, and the last weights have the bits of a run that nothing disturbed.
"""

import os
import random
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tools.packages import ROOT

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform == "win32", reason="gloo and SIGKILL are those of POSIX"),
]
STEPS = 18
OPTIONS = f"--steps {STEPS} --seq-len 300 --every 3".split()


def printed_command(page: Path) -> list[str]:
    """The arguments of torchrun in the page's one command that trains over processes."""
    (command,) = re.findall(r"^uv run torchrun (.*train_longnet\.py)$", page.read_text(), re.M)
    return shlex.split(command)


def start(arguments: list[str], folder: Path) -> subprocess.Popen[str]:
    files = ["--checkpoints", str(folder / "checkpoints"), "--weights", str(folder / "weights.pt")]
    return subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", *arguments, *OPTIONS, *files],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, dict[str, torch.Tensor]]:
    """What the README's command prints, and the last weights."""
    folder = tmp_path_factory.mktemp("undisturbed")
    process = start(printed_command(ROOT / "README.md"), folder)
    output, _ = process.communicate(timeout=400)
    assert process.returncode == 0, output
    return output, torch.load(folder / "weights.pt")


def test_the_command_of_the_readmes_trains_on_a_sequence_cut_in_two(undisturbed) -> None:
    output, _ = undisturbed
    page = ROOT / "packages" / "dilated-ring" / "README.md"
    assert printed_command(page) == printed_command(ROOT / "README.md")
    losses = [float(loss) for loss in re.findall(r"step \d+ of \d+: loss ([\d.]+)", output)]
    assert len(losses) == STEPS
    assert losses[-1] < losses[0] - 1
    assert "rank 1 is process" in output


@pytest.mark.parametrize("seed", [0, 1])
def test_a_killed_run_ends_with_the_bits_of_an_undisturbed_one(undisturbed, seed, tmp_path) -> None:
    draw = random.Random(seed)
    kills = {draw.randint(2, 6): draw.randrange(2), draw.randint(8, 13): draw.randrange(2)}
    arguments = ["--max-restarts=3", *printed_command(ROOT / "README.md")]
    processes: dict[int, int] = {}
    output = ""
    with start(arguments, tmp_path) as launcher:
        assert launcher.stdout
        for line in launcher.stdout:
            output += line
            if begun := re.match(r"rank (\d+) is process (\d+)", line):
                processes[int(begun[1])] = int(begun[2])
            if (step := re.match(r"step (\d+) of", line)) and int(step[1]) in kills:
                os.kill(processes[kills.pop(int(step[1]))], signal.SIGKILL)
    assert launcher.returncode == 0, output
    assert not kills
    # Both ranks start three times, and the last time not from the beginning.
    starts = re.findall(r"rank \d is process \d+; (\d+) steps are done", output)
    assert len(starts) == 6, output
    assert int(starts[-1]) >= 6
    last = torch.load(tmp_path / "weights.pt")
    for name, weight in undisturbed[1].items():
        assert torch.equal(last[name], weight), name
