"""Every check of the workspace is a session here; `nox -l` lists them.

A session's environment holds what it asks for and nothing else: `uv sync` removes the rest. So
environments are reused, and one package's tests cannot lean on another package's dependencies.
`tests` and `exhaustive` even share one, because there PyTorch is compiled to bytecode once and not
for every package. Of these sessions one can run at a time.
"""

import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import nox

ROOT = Path(__file__).parent
sys.path.insert(0, str(ROOT))  # nox is a console script, so this folder is not importable

from tools.packages import find_packages  # noqa: E402

PACKAGES = find_packages(ROOT)
SHARED_ENVIRONMENT = ROOT / ".nox" / "tests"

nox.needs_version = ">=2026.4"
nox.options.default_venv_backend = "uv"
nox.options.reuse_venv = "yes"
nox.options.sessions = ["lint", "types", "structure", "tests", "docs"]

os.environ["UV_PYTHON_DOWNLOADS"] = "never"  # a session runs on the Python that runs nox


@nox.session(venv_backend="none")
@nox.parametrize("target", [*PACKAGES, "tools"], ids=[*PACKAGES, "tools"])
def tests(session: nox.Session, target: str) -> None:
    """Tests of one package, with only what it declares; "tools": of the workspace itself."""
    if target == "tools":
        sync_workspace(session)
        check_structure(session)
        run_pytest(session, "tools", "tests-integration", "-m", "not slow and not exhaustive")
    else:
        sync(session, "--package", target, "--group", "test")
        run_pytest(session, f"packages/{target}/tests")


@nox.session(venv_backend="none")
@nox.parametrize("target", [*PACKAGES], ids=[*PACKAGES])
def exhaustive(session: nox.Session, target: str) -> None:
    """The large sweeps of one package: tests marked `exhaustive`, which `tests` leaves out."""
    sync(session, "--package", target, "--group", "test")
    sweeps = ["-m", "exhaustive", "--timeout=3600"]
    none_selected = 5  # pytest's exit code for a package without sweeps
    run_pytest(session, f"packages/{target}/tests", *sweeps, success_codes=[0, none_selected])


@nox.session(reuse_venv=False)  # pip removes nothing
@nox.parametrize("target", [*PACKAGES], ids=[*PACKAGES])
def lowest(session: nox.Session, target: str) -> None:
    """Tests of one package with the oldest versions that it allows; meant for Python 3.11.

    The only session that resolves: old versions need others than the pinned ones, so what it
    installs depends on the day. That is why `tests` does not include it.
    """
    project = ROOT / "packages" / target
    # Inside the workspace uv would apply the pins, which are not the oldest versions.
    with tempfile.TemporaryDirectory() as outside, session.chdir(outside):
        session.install(
            "--resolution=lowest-direct",
            "--editable",
            str(project),
            "--group",
            f"{project}/pyproject.toml:test",
        )
    # An old library may use what a newer one that it depends on has deprecated.
    run_pytest(session, f"packages/{target}/tests", "-W", "ignore::DeprecationWarning")


@nox.session
def lint(session: nox.Session) -> None:
    """Formatting and lint rules, by ruff."""
    sync(session, "--only-group", "lint")
    session.run("ruff", "format", "--check")
    session.run("ruff", "check")


@nox.session
def types(session: nox.Session) -> None:
    """Types, by pyright: strict in the packages."""
    sync_workspace(session)
    session.run("pyright", "--pythonpath", f"{session.bin}/python")


@nox.session
def structure(session: nox.Session) -> None:
    """Import layers, sibling ranges, file lengths, public names, sources of numbers, pins."""
    sync_workspace(session)
    check_structure(session)


@nox.session(venv_backend="none")  # an environment could not be made when a pin leaves its range
def lock(session: nox.Session) -> None:
    """Resolve; write the pins and requirements.lock. `-- --upgrade [NAME ...]` moves versions."""
    session.run(sys.executable, "-m", "tools.lock", "--write", *session.posargs)


@nox.session
def integration(session: nox.Session) -> None:
    """The packages together, and every example of the documentation."""
    sync_workspace(session)
    run_pytest(session, "tests-integration", "--ignore=tests-integration/test_wheels.py")


@nox.session
def wheels(session: nox.Session) -> None:
    """Build all packages; install each alone in an empty environment and run its tests there."""
    sync_workspace(session)
    # One process, because it fills dist/; the tests that it runs use more.
    run_pytest(session, "tests-integration/test_wheels.py", "--numprocesses=0", "--timeout=3600")


@nox.session
def docs(session: nox.Session) -> None:
    """Build the documentation into site/; links to nowhere and foreign assets are errors."""
    sync(session, "--only-group", "docs")
    session.run("python", "-m", "tools.api_pages")
    # zensical is a console script, so this folder is not importable without PYTHONPATH.
    session.run("zensical", "build", "--strict", "--clean", env={"PYTHONPATH": str(ROOT)})
    session.run("python", "-m", "tools.check_site")


@nox.session
def multigpu(session: nox.Session) -> None:
    """Distributed checks under torchrun: NCCL on two or more GPUs, otherwise 4 gloo processes."""
    sync_workspace(session)
    count = "import torch; print(torch.cuda.device_count())"
    gpus = int(session.run("python", "-c", count, silent=True) or 0)
    backend, processes = ("nccl", gpus) if gpus >= 2 else ("gloo", 4)
    session.log(f"{gpus} GPUs visible: {processes} processes over {backend}")
    torchrun = ["torchrun", "--standalone", f"--nproc-per-node={processes}"]
    for script in ["ddp_gradients.py", "ring_gradients.py"]:
        session.run(
            *torchrun,
            f"tests-integration/{script}",
            "--backend",
            backend,
            env={"OMP_NUM_THREADS": "1"},  # torchrun's own default, without its warning
        )


@nox.session
def bench(session: nox.Session) -> None:
    """Run benchmarks/run.py with the arguments after `--`."""
    sync_workspace(session)
    session.run("python", "benchmarks/run.py", *session.posargs)


def environment_of(session: nox.Session) -> str:
    """The folder of the session's own environment, or of the shared one."""
    if session.virtualenv.venv_backend == "none":
        return str(SHARED_ENVIRONMENT)
    return session.virtualenv.location


def sync(session: nox.Session, *arguments: str) -> None:
    """Make the session's environment hold exactly what `uv sync` selects."""
    session.run_install(
        "uv",
        "sync",
        "--quiet",
        f"--python={sys.executable}",  # another Python than last time replaces the environment
        *arguments,
        env={"UV_PROJECT_ENVIRONMENT": environment_of(session)},
        external=True,
    )


def sync_workspace(session: nox.Session) -> None:
    """All packages and the development tools."""
    sync(session, "--all-packages")


def run(session: nox.Session, *command: str, success_codes: Sequence[int] = (0,)) -> None:
    """Run a command in the session's environment, with one thread in each process."""
    environment = environment_of(session)
    session.run(
        *("uv", "run", "--no-sync", *command),
        env={
            "UV_PROJECT_ENVIRONMENT": environment,
            "VIRTUAL_ENV": environment,
            "OMP_NUM_THREADS": "1",  # processes share the cores
            # Where Python writes no bytecode, each process compiles PyTorch: three seconds.
            "PYTHONDONTWRITEBYTECODE": "",
            "PYTHONPYCACHEPREFIX": str(ROOT / ".nox" / "bytecode"),
        },
        external=True,
        success_codes=success_codes,
    )


def run_pytest(session: nox.Session, *arguments: str, success_codes: Sequence[int] = (0,)) -> None:
    """Run pytest with a process for each core, up to four, and an end for a test that hangs."""
    processes = ["--numprocesses=auto", "--maxprocesses=4", "--dist=worksteal", "--timeout=600"]
    # As a module: processes that a test starts do not import a script again.
    pytest = ["python", "-m", "pytest", *processes, *arguments, *session.posargs]
    run(session, *pytest, success_codes=success_codes)


def check_structure(session: nox.Session) -> None:
    """The rules about files and imports that need no test run."""
    run(session, "lint-imports", "--no-logo", "--no-cache")
    for check in ["check_siblings", "check_lengths", "check_api", "check_numbers", "lock"]:
        run(session, "python", "-m", f"tools.{check}")
