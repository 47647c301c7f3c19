"""torchrun starts a run again after a process ran out of memory, and the run goes on with less."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from dilated_models.training.metrics import read_metrics

OPTIONS = [
    *("--steps", "3", "--batch-size", "6", "--accumulation", "2", "--seq-len", "30"),
    *("--d-model", "16", "--heads", "4", "--layers", "1", "--feed-forward", "16"),
    *("--segment-lengths", "8,32", "--dilation-rates", "1,2", "--device", "cpu"),
    *("--validation-tokens", "64", "--final-validation-tokens", "64"),
]
FAULTS = str(Path(__file__).with_name("test_several_processes.py"))
# The faults of the tests beside this one, on one rank, after every start.
FAULTY = f"""
import os, runpy, sys
from dilated_models.cli import main
kind, sys.argv[1] = sys.argv[1], "train"
if os.environ["RANK"] == "1":
    runpy.run_path({FAULTS!r})["limit_memory"](kind, 1)
main()
"""


@pytest.mark.exhaustive
@pytest.mark.parametrize(
    ("policy", "kind", "measure"),
    [
        ("checkpoint", "no row fits", (0, 2, True)),  # before there is a run
        ("checkpoint", "no memory on the CPU", (0, 2, True)),
        ("halve", "no memory on a GPU", (0, 6, False)),
    ],
)
@pytest.mark.skipif(os.name != "posix", reason="the faults need POSIX")
def test_torchrun_goes_on_with_less_memory(text, tmp_path, policy, kind, measure):
    (script := tmp_path / "faulty.py").write_text(FAULTY)
    command = "torch.distributed.run --standalone --nproc-per-node 2 --max-restarts 2"
    result = subprocess.run(
        [
            *(sys.executable, "-m", *command.split(), str(script), kind),
            *("--text", str(text), *OPTIONS, "--on-out-of-memory", policy),
        ],
        cwd=tmp_path,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=500,
        check=False,
    )
    assert result.returncode == 0, result.stdout
    (out,) = (tmp_path / "runs").iterdir()
    found = [r for r in read_metrics(out) if r["kind"] == "out_of_memory"]
    assert [(r["step"], r["accumulation"], r["activation_checkpointing"]) for r in found] == [
        measure
    ]
    assert "); after step 0 the run" in result.stdout
