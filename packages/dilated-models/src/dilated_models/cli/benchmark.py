"""`dilated info --benchmark`: time each backend here, and show the choice of "auto" with that.

Beside the backends stands PyTorch's attention of every query to every earlier key, at the same
length.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING

import typer

from dilated_models.cli.errors import fail

if TYPE_CHECKING:
    import torch
    from dilated_kernels.ranking.file import Case, MeasuredChoice, Timing

_DENSE = "dense"
_SECONDS = 0.3


def benchmark(
    device: torch.device,
    *,
    head_dims: Sequence[int] | None,
    seq_lens: Sequence[int] | None,
    num_heads: int | None,
    save: Path | None,
) -> None:
    """Measure, print a table, and write the measurement to `save` if that is given."""
    try:
        from dilated_kernels import measure_backends
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] != "dilated_kernels":
            raise
        raise fail(
            "dilated-kernels is not installed; --benchmark needs it: "
            "pip install 'dilated-models[kernels]'"
        ) from error
    if save is not None:
        _check_writable(save)
    measured = measure_backends(
        device,
        head_dims=head_dims,
        seq_lens=seq_lens,
        num_heads=num_heads,
        on_case=lambda case: typer.echo(f"measured {_size(case)}", err=True),
    )
    if save is not None:
        measured.save(save)
    dense: list[Timing] = []
    for case in measured.cases:
        dense.append(_time_dense(device, case, measured))
        typer.echo(f"measured dense attention: {_size(case)}", err=True)
    typer.echo(_table(measured, dense))
    typer.echo()
    typer.echo("\n".join(_choices(measured, device)))
    if save is not None:
        typer.echo()
        typer.echo(
            f"saved; to make backend='auto' use it in a program:\n"
            f"from dilated_kernels import use_measured_choice\n"
            f"use_measured_choice({str(save)!r})"
        )


def _check_writable(path: Path) -> None:
    """Check the path before the measurement, which takes minutes.

    Raises:
        ValueError: If `path` is a folder, or in one that does not exist.
    """
    if path.is_dir():
        raise ValueError(
            f"--save is {str(path)!r}, which is a folder; it must be the name of a file."
        )
    if not path.parent.is_dir():
        raise ValueError(
            f"--save is {str(path)!r} and there is no folder {str(path.parent)!r}; make it first."
        )


def _time_dense(device: torch.device, case: Case, measured: MeasuredChoice) -> Timing:
    """PyTorch's attention of every query to every key that the mask allows, on the case's sizes."""
    import torch
    from dilated_kernels.ranking.file import Timing
    from torch.nn.functional import scaled_dot_product_attention

    shape = (measured.batch_size, measured.num_heads, case.seq_len, case.head_dim)
    generator = torch.Generator().manual_seed(0)
    q, k, v, dout = (
        torch.randn(shape, generator=generator).to(device, getattr(torch, case.dtype))
        for _ in range(4)
    )

    def attend() -> torch.Tensor:
        return scaled_dot_product_attention(q, k, v, is_causal=measured.is_causal)

    try:
        forward = _seconds(torch.no_grad()(attend), device)
        leaves = [x.requires_grad_() for x in (q, k, v)]
        both = _seconds(lambda: torch.autograd.grad(attend(), leaves, dout), device)
    except RuntimeError as error:  # out of memory, or a dtype that the device lacks
        first_line = (str(error).splitlines() or [""])[0]
        return Timing(_DENSE, None, None, f"failed with {type(error).__name__}: {first_line}")
    return Timing(_DENSE, forward, both, None)


def _seconds(run: Callable[[], object], device: torch.device) -> float:
    """Median of at least three runs after one that warms up."""
    import torch

    def timed() -> float:
        if device.type != "cpu":
            torch.accelerator.synchronize(device)
        start = time.perf_counter()
        run()
        if device.type != "cpu":
            torch.accelerator.synchronize(device)
        return time.perf_counter() - start

    first = timed()
    return median(timed() for _ in range(min(100, max(3, int(_SECONDS / first)))))


def _table(measured: MeasuredChoice, dense: Sequence[Timing]) -> str:
    from dilated_core import DilatedPattern

    lengths = ",".join(map(str, measured.pattern.segment_lengths))
    rates = ",".join(map(str, measured.pattern.dilation_rates))
    lines = [
        f"{measured.device_name}: {measured.num_heads} heads, "
        f"{'causal' if measured.is_causal else 'not causal'}, segments {lengths}, rates {rates}",
        f"{'dtype':<9}{'head_dim':>9}{'positions':>10}  {'backend':<10}"
        f"{'forward':>27}{'forward and backward':>27}",
    ]
    for case, beside in zip(measured.cases, dense, strict=True):
        every_key = replace(measured, pattern=DilatedPattern([case.seq_len], [1]))
        rows = [*((timing, measured) for timing in case.timings), (beside, every_key)]
        for timing, counted in rows:
            size = f"{case.dtype:<9}{case.head_dim:>9}{case.seq_len:>10}  {timing.backend:<10}"
            if timing.forward_s is None or timing.forward_backward_s is None:
                lines.append(f"{size}  refused: {timing.refused}")
                continue
            forward = _rate(timing.forward_s, counted.flops(case, by="forward"))
            both = _rate(timing.forward_backward_s, counted.flops(case, by="forward_backward"))
            lines.append(f"{size}{forward}{both}")
    keys = "all earlier keys" if measured.is_causal else "all keys"
    lines.append(
        f"{_DENSE} is no backend but PyTorch's scaled_dot_product_attention, where each query sees "
        f"{keys}."
    )
    return "\n".join(lines)


def _rate(seconds: float, flops: int) -> str:
    rate = flops / seconds / 1e9
    digits = f"{rate:.3g}" if rate < 100 else f"{rate:.0f}"
    return f"{seconds * 1e3:>10.2f} ms {digits:>8} GF/s"


def _choices(measured: MeasuredChoice, device: torch.device) -> list[str]:
    """The backend that "auto" takes in each case, without and with the measurement."""
    import torch
    from dilated_core import AttentionInputs
    from dilated_core.backends.registry import choose_backend
    from dilated_kernels import use_measured_choice

    inputs = [
        AttentionInputs(
            device,
            getattr(torch, case.dtype),
            measured.num_heads,
            case.head_dim,
            seq_len=case.seq_len,
        )
        for case in measured.cases
    ]
    before = [choose_backend("auto", case).name for case in inputs]
    use_measured_choice(measured)
    try:
        after = [choose_backend("auto", case).name for case in inputs]
    finally:
        use_measured_choice(None)
    return [
        "what 'auto' takes without this measurement, and with it:",
        *(
            f"  {_size(case):<42}{old:<10}{new}"
            for case, old, new in zip(measured.cases, before, after, strict=True)
        ),
    ]


def _size(case: Case) -> str:
    return f"{case.dtype}, heads of {case.head_dim}, {case.seq_len} positions"
