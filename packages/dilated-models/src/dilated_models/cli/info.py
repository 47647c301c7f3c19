"""`dilated info`."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dilated_models.cli.options import integers

if TYPE_CHECKING:
    import torch

_PACKAGES = (
    "dilated-models",
    "dilated-core",
    "dilated-kernels",
    "dilated-ring",
    "dilated-sparse",
    "torch",
    "triton",
    "flash-attn",
    "xformers",
    "numpy",
    "safetensors",
    "tokenizers",
    "transformers",
)


def info(
    device: Annotated[
        str | None,
        typer.Option(
            help="Show this device only: auto (a CUDA device, else the CPU), cpu, cuda:0, mps."
        ),
    ] = None,
    benchmark: Annotated[
        bool,
        typer.Option("--benchmark", help="Time the backends on one device."),
    ] = False,
    save: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Write the measurement to this file, as JSON."),
    ] = None,
    seq_lens: Annotated[
        str | None,
        typer.Option(metavar="N,N", help="Sequence lengths to time; typical ones if left out."),
    ] = None,
    head_dims: Annotated[
        str | None,
        typer.Option(metavar="N,N", help="Head dimensions to time; typical ones if left out."),
    ] = None,
    heads: Annotated[
        int | None, typer.Option(help="Number of heads; a typical one if left out.")
    ] = None,
) -> None:
    """Versions, devices, attention backends that run here, and reasons why others do not."""
    given = {"--save": save, "--seq-lens": seq_lens, "--head-dims": head_dims, "--heads": heads}
    for option, value in given.items():
        if value is not None and not benchmark:
            raise ValueError(
                f"{option} is {str(value)!r} without --benchmark; it must go with --benchmark, "
                f"so add that."
            )
    lengths = integers("--seq-lens", seq_lens)
    dims = integers("--head-dims", head_dims)
    from dilated_models.training.devices import choose_device

    chosen = choose_device("auto" if device is None else device)
    present = _describe_machine()
    typer.echo()
    if benchmark:
        from dilated_models.cli.benchmark import benchmark as measure

        measure(chosen, head_dims=dims, seq_lens=lengths, num_heads=heads, save=save)
    else:
        typer.echo("\n\n".join(_explanations(present if device is None else [chosen])))


def _describe_machine() -> list[torch.device]:
    """Print versions and devices; return the devices."""
    import torch

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
    return devices


def _explanations(devices: list[torch.device]) -> list[str]:
    import torch
    from dilated_core import explain_backends

    return [
        explain_backends(device=device, dtype=dtype)
        for device in devices
        for dtype in (torch.float32, torch.bfloat16)
    ]


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"
