"""`dilated info`."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version

import typer

_PACKAGES = (
    "dilated-models",
    "dilated-core",
    "dilated-kernels",
    "dilated-ring",
    "dilated-sparse",
    "torch",
    "triton",
    "numpy",
    "safetensors",
    "tokenizers",
    "transformers",
)


def info() -> None:
    """Versions, devices, and which attention backends run here, with reasons for the others."""
    import torch
    from dilated_core import explain_backends

    typer.echo(f"{'python':<16}{platform.python_version()} on {platform.platform()}")
    for package in _PACKAGES:
        typer.echo(f"{package:<16}{_version(package)}")
    typer.echo()
    typer.echo(f"cpu: {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}")
    devices = [torch.device("cpu")]
    for index in range(torch.cuda.device_count()):
        _, memory = torch.cuda.mem_get_info(index)
        major, minor = torch.cuda.get_device_capability(index)
        typer.echo(
            f"cuda:{index}: {torch.cuda.get_device_name(index)}, {memory / 2**30:.0f} GiB, "
            f"compute capability {major}.{minor}"
        )
        devices.append(torch.device("cuda", index))
    if len(devices) == 1:
        built_for = torch.version.cuda or torch.version.hip
        typer.echo("no CUDA device: " + ("none is visible" if built_for else "torch is CPU-only"))
    if torch.backends.mps.is_available():
        typer.echo("mps: available")
        devices.append(torch.device("mps"))
    for device in devices:
        for dtype in (torch.float32, torch.bfloat16):
            typer.echo()
            typer.echo(explain_backends(device=device, dtype=dtype))


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"
