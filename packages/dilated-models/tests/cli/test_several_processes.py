"""`torchrun -m dilated_models.train`: what happens to a run when a process is lost, or fails.

Processes come from a fork server, with the variables that torchrun sets. One test starts torchrun.
"""

import contextlib
import io
import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from dilated_core.testing.processes import run_processes
from dilated_models import LongNetLM
from dilated_models.cli.app import run as run_command
from dilated_models.cli.progress import TrainingProgress
from dilated_models.training import checkpoints, samples
from dilated_models.training.metrics import read_metrics
from dilated_models.training.out_of_memory import MEASURE_FILE

resource = pytest.importorskip("resource", reason="only POSIX limits the size of files")
pytestmark = pytest.mark.skipif(os.name != "posix", reason="sends POSIX signals")

OPTIONS = [
    *("--steps", "8", "--batch-size", "6", "--accumulation", "2", "--seq-len", "30"),
    *("--d-model", "16", "--heads", "4", "--layers", "1", "--feed-forward", "16"),
    *("--segment-lengths", "8,32", "--dilation-rates", "1,2", "--dropout", "0.1"),
    *("--validate-every", "4", "--validation-tokens", "64", "--final-validation-tokens", "64"),
    *("--checkpoint-every", "2", "--warmup-steps", "2", "--device", "cpu"),
]

ON_GPU = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
ON_CPU = RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 99 bytes.")
# Kinds of faults: the error, and how many tokens a process can compute at once.
OUT_OF_MEMORY = {
    "no memory on a GPU": (ON_GPU, 30),
    "no memory on the CPU": (ON_CPU, 30),
    "no row fits": (ON_GPU, 0),
}


def train(
    arguments: list[str], port: int, fault: tuple[str, int, int] | None, released: str
) -> tuple[int, str]:
    """`dilated train` on this rank; code and output. The fault is a kind, a rank and an event.

    A rank that hangs goes on when another one has made the file `released`.
    """
    rank, size = dist.get_rank(), dist.get_world_size()
    dist.destroy_process_group()
    samples._SAMPLE_TOKENS = 2
    numbers = {"RANK": rank, "WORLD_SIZE": size, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": size}
    os.environ |= {name: str(value) for name, value in numbers.items()}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    if fault is not None and fault[1] == rank:
        prepare(fault[0], fault[2], Path(released))
    output = io.StringIO()
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
        code = run_command(["train", *arguments])
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    if fault is None or fault[1] != rank:
        Path(released).touch()
    # `run_processes` ends with a barrier: of this rank alone, for others may be dead.
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    return code, output.getvalue()


def prepare(kind: str, last: int, released: Path) -> None:
    """Let something happen at the event with this number: a step, a file, a phase of the run."""
    events = 0

    def after(function: Any) -> Any:
        def wrapped(*arguments: Any, **options: Any) -> Any:
            nonlocal events
            result = function(*arguments, **options)
            events += 1
            if events == last:
                happen(kind, released)
            return result

        return wrapped

    if kind in OUT_OF_MEMORY:
        limit_memory(kind, last)
        return
    TrainingProgress.stepped = after(TrainingProgress.stepped)
    if kind == "kill anywhere":
        TrainingProgress.busy = after(TrainingProgress.busy)
        for name in ("_tensors", "_digests", "_finish"):
            setattr(checkpoints, name, after(getattr(checkpoints, name)))


def limit_memory(kind: str, first: int) -> None:
    """From a forward of training on, more tokens fit only if blocks are recomputed."""
    (error, room), real, calls = OUT_OF_MEMORY[kind], LongNetLM.hidden_states, 0

    def hidden_states(self: LongNetLM, tokens: torch.Tensor, *rest: Any, **options: Any) -> Any:
        nonlocal calls
        hidden = real(self, tokens, *rest, **options)
        is_step = self.training and torch.is_grad_enabled()
        calls += is_step
        is_small = self.config.activation_checkpointing or len(tokens) <= room
        if is_step and calls >= first and not is_small:
            raise error
        return hidden

    LongNetLM.hidden_states = hidden_states


def happen(kind: str, released: Path) -> None:
    if kind.startswith("kill"):
        os.kill(os.getpid(), signal.SIGKILL)
    elif kind == "stop":
        signal.raise_signal(signal.SIGTERM)
    elif kind == "full disk":
        resource.setrlimit(resource.RLIMIT_FSIZE, (2000, resource.RLIM_INFINITY))
    elif kind == "hang":
        while not released.exists():
            time.sleep(0.05)


class Launcher:
    """Starts runs on several processes, each in a folder of its own."""

    def __init__(self, text: Path, folder: Path, size: int) -> None:
        self.text, self.folder, self.size = text, folder, size

    def __call__(
        self, out: Path, *more: str, fault: tuple[str, int, int] | None = None
    ) -> list[tuple[int, str]]:
        """Start, or continue what was begun; code and output of each rank."""
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        if (out / "config.json").exists():
            arguments = ["--resume", "--out", str(out), *more]
        else:
            arguments = ["--text", str(self.text), "--out", str(out), *OPTIONS, *more]
        released = self.folder / f"released {port}"
        return run_processes(train, self.size, arguments, port, fault, str(released), timeout_s=400)

    def or_killed(self, out: Path, *more: str, fault: Any) -> list[tuple[int, str]] | None:
        """As a call; None if a rank was killed."""
        try:
            return self(out, *more, fault=fault)
        except RuntimeError as error:
            if "exit code -9" not in str(error):
                raise
            return None

    def to_the_end(self, out: Path, *more: str) -> str:
        results = self(out, *more)
        assert [code for code, _ in results] == [0] * self.size, results
        assert all(text == "" for _, text in results[1:])  # rank 0 speaks for all
        return results[0][1]


@pytest.fixture
def launcher(text, tmp_path) -> Launcher:
    return Launcher(text, tmp_path, 2)


def same(out: Path, wanted: Path) -> None:
    """The same weights, all bits, and the same metrics."""
    records = [
        [
            (r["kind"], r["step"], r.get("loss"), r["bits_per_byte"])
            for r in read_metrics(folder)
            if r["kind"] not in ("final", "out_of_memory")
        ]
        for folder in (out, wanted)
    ]
    assert records[0] == records[1]
    weights = [(folder / "model.safetensors").read_bytes() for folder in (out, wanted)]
    headers = [int.from_bytes(content[:8], "little") + 8 for content in weights]
    assert weights[0][headers[0] :] == weights[1][headers[1] :]  # the header has the run's identity


@pytest.mark.parametrize(
    ("grid", "kind"),
    [
        (["--fsdp"], "no memory on a GPU"),
        pytest.param(["--cp", "2"], "no memory on the CPU", marks=pytest.mark.exhaustive),
        pytest.param([], "no memory on the CPU", marks=pytest.mark.exhaustive),
    ],
)
def test_a_run_without_memory_and_a_killed_one_end_with_the_bits_of_another(
    launcher, tmp_path, grid, kind
):
    """Recomputed blocks change no bit, and neither does SIGKILL."""
    output = launcher.to_the_end(whole := tmp_path / "whole", *grid)
    assert f"{'FSDP over 2 x 1' if '--fsdp' in grid else 'DDP over'}" in output
    more = [*grid, "--on-out-of-memory", "checkpoint"]
    (one, first), (two, second) = launcher(
        out := tmp_path / "out", *more, fault=(kind, 1, third_step(grid))
    )
    assert (one, two) == (1, 2)
    assert "rank 0 stops: rank 1 failed: NeedsRestart: out of memory (" in first
    assert "when all processes start again, the run recomputes each block" in second
    assert "continue with: torchrun --nproc-per-node 2 -m dilated_models.train --resume" in second
    assert (out / MEASURE_FILE).exists()
    with pytest.raises(RuntimeError, match=r"rank 1, exit code -9"):
        launcher(out, *grid, fault=("kill", 1, 3))  # in step 5, after the checkpoint of step 4
    assert {path.name for path in out.glob("checkpoint*")} == {"checkpoint-000000004"}
    assert "continuing after step 4" in launcher.to_the_end(out, *grid)
    same(out, whole)
    assert measures(out) == [(2, "checkpoint", 2, True)]
    assert json.loads((out / "config.json").read_text())["model"]["activation_checkpointing"]
    assert not (out / MEASURE_FILE).exists()


def third_step(grid: list[str]) -> int:
    """The first forward of step 3, after one before the run; with `--cp` a step has two parts."""
    return 6 if "--cp" in grid else 4


def measures(folder: Path) -> list[tuple[int, str, int, bool]]:
    return [
        (r["step"], r["policy"], r["accumulation"], r["activation_checkpointing"])
        for r in read_metrics(folder)
        if r["kind"] == "out_of_memory"
    ]


@pytest.mark.exhaustive
@pytest.mark.parametrize("grid", [["--fsdp"], ["--cp", "2"], []])
def test_halved_parts_change_rounding_alone(launcher, tmp_path, grid):
    """And where a part has one row already, the run stops and names what is left."""
    more = [*grid, "--dropout", "0"]
    launcher.to_the_end(whole := tmp_path / "whole", *more)
    kind, out = "no memory on a GPU", tmp_path / "out"
    results = launcher(out, *more, "--on-out-of-memory", "halve", fault=(kind, 0, third_step(grid)))
    assert [code for code, _ in results] == [2, 1]
    assert [code for code, _ in launcher(out, *grid, fault=(kind, 0, 1))] == [0, 0]
    assert measures(out) == [(2, "halve", 6, False)]
    found, wanted = (
        [r["loss"] for r in read_metrics(folder) if r["kind"] == "step"] for folder in (out, whole)
    )
    assert found == pytest.approx(wanted, rel=1e-5)
    launcher.to_the_end(last := tmp_path / "last", *more, "--accumulation", "6", "--steps", "2")
    limits = [*grid, "--steps", "4", "--on-out-of-memory", "halve"]
    results = launcher(last, *limits, "--timeout", "60", fault=("no row fits", 1, 2))
    assert [code for code, _ in results] == [1, 2]
    assert (
        "a part has one row already; continue with --on-out-of-memory checkpoint" in (results[1][1])
    )


@pytest.mark.exhaustive
@pytest.mark.parametrize("grid", [["--fsdp"], ["--cp", "3"], []])
def test_twenty_kills_change_no_bit(launcher, tmp_path, grid):
    """SIGKILL for a random rank at a random moment: in steps, while saving, while validating."""
    launcher.size = 3
    more = [*grid, "--steps", "24"]
    launcher.to_the_end(whole := tmp_path / "whole", *more)
    draw, out, kills = random.Random(str(grid)), tmp_path / "out", 0
    while kills < 20:
        fault = ("kill anywhere", draw.randrange(3), draw.randint(1, 14))
        results = launcher.or_killed(out, *more, fault=fault)
        if results is None:
            kills += 1
        else:  # the run ended before that moment: once more from the beginning
            assert [code for code, _ in results] == [0] * 3, results
            same(out, whole)
            out = tmp_path / f"out{kills}"
    launcher.to_the_end(out, *more)
    same(out, whole)


@pytest.mark.exhaustive
def test_a_signal_for_one_rank_saves_and_ends_all(launcher, tmp_path):
    launcher.to_the_end(whole := tmp_path / "whole")
    results = launcher(out := tmp_path / "out", fault=("stop", 1, 3))
    assert [code for code, _ in results] == [143, 143]
    assert "stopped by SIGTERM after step 3; everything is saved" in results[0][1]
    assert "torchrun --nproc-per-node 2 -m dilated_models.train --resume --out" in results[0][1]
    assert (out / "checkpoint-000000003").is_dir()
    launcher.to_the_end(out)
    same(out, whole)


@pytest.mark.exhaustive
@pytest.mark.parametrize("rank", [0, 1])
def test_a_full_disk_keeps_the_last_checkpoint(launcher, tmp_path, rank):
    launcher.to_the_end(whole := tmp_path / "whole")
    results = launcher(out := tmp_path / "out", fault=("full disk", rank, 3))
    assert all(code in (1, 2) for code, _ in results), results
    assert "File too large" in "".join(text for _, text in results)
    assert "the last checkpoint is whole" in "".join(text for _, text in results)
    assert {path.name for path in out.glob("*checkpoint*")} == {"checkpoint-000000002"}
    launcher.to_the_end(out)
    same(out, whole)


@pytest.mark.exhaustive
@pytest.mark.parametrize(("rank", "grid"), [(1, []), (0, ["--fsdp"]), (2, ["--cp", "3"])])
def test_a_rank_that_hangs_is_named(launcher, tmp_path, rank, grid):
    launcher.size = 3
    results = launcher(tmp_path / "out", *grid, "--timeout", "15", fault=("hang", rank, 3))
    for other, (code, text) in enumerate(results):
        assert code == 1, results
        if other != rank:
            assert re.search(rf"rank {rank} (does not answer|failed)", text), results


@pytest.mark.exhaustive
def test_a_loss_that_is_not_finite_ends_all_ranks(launcher, tmp_path):
    results = launcher(tmp_path / "out", "--lr", "1e30", "--warmup-steps", "0")
    assert [code for code, _ in results] == [1, 1], results
    assert re.search(r"is not finite in step \d+, on .+; try a lower --lr", results[0][1])
    assert results[1][1] == ""


@pytest.mark.exhaustive
def test_errors_of_users_are_one_line_of_one_rank(launcher, tmp_path):
    for more, message in [
        (["--cp", "3"], "--cp is 3 and there are 2 processes; --cp must divide their number"),
        (["--batch-size", "3", "--accumulation", "1"], "must be a multiple of that"),
        (["--device", "cuda:7"], "which this machine does not have"),
        (["--heads", "5"], "--heads is 5"),
    ]:
        results = launcher(tmp_path / "out", *more)
        assert [code for code, _ in results] == [2, 2], results
        assert message in results[0][1]
        if "cuda:7" not in more:
            assert results[1][1] == ""
        assert not (tmp_path / "out").exists()


def children(pid: int) -> list[int]:
    return [int(p) for p in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


@pytest.mark.exhaustive
@pytest.mark.skipif(sys.platform != "linux", reason="finds the processes of torchrun in /proc")
def test_torchrun_starts_a_killed_run_again(launcher, text, tmp_path):
    """Without --out and --resume: the run of an earlier start is found and continued."""
    launcher.to_the_end(whole := tmp_path / "whole", "--steps", "12")
    command = "torch.distributed.run --standalone --nproc-per-node 2 --max-restarts 2 -m"
    process = subprocess.Popen(
        [
            *(sys.executable, "-m", *command.split(), "dilated_models.train"),
            *("--text", str(text), *OPTIONS, "--steps", "12"),
        ],
        cwd=tmp_path,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    while process.poll() is None and not [*tmp_path.glob("runs/*/checkpoint-00000000[2-9]")]:
        time.sleep(0.01)
    os.kill(children(process.pid)[1], signal.SIGKILL)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    assert re.search(r"continuing after step \d+", output), output
    (out,) = (tmp_path / "runs").iterdir()
    same(out, whole)
