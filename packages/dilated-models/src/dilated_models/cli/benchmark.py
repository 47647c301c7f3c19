"""`dilated info --benchmark`: time each backend here, and show the choice of "auto" with that."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from dilated_models.cli.errors import fail, user_errors

if TYPE_CHECKING:
    import torch
    from dilated_kernels.ranking.file import Case, MeasuredChoice


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
    with user_errors():
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
    typer.echo(_table(measured))
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


def _table(measured: MeasuredChoice) -> str:
    lengths = ",".join(map(str, measured.pattern.segment_lengths))
    rates = ",".join(map(str, measured.pattern.dilation_rates))
    lines = [
        f"{measured.device_name}: {measured.num_heads} heads, "
        f"{'causal' if measured.is_causal else 'not causal'}, segments {lengths}, rates {rates}",
        f"{'dtype':<9}{'head_dim':>9}{'positions':>10}  {'backend':<10}"
        f"{'forward':>27}{'forward and backward':>27}",
    ]
    for case in measured.cases:
        for timing in case.timings:
            size = f"{case.dtype:<9}{case.head_dim:>9}{case.seq_len:>10}  {timing.backend:<10}"
            if timing.forward_s is None or timing.forward_backward_s is None:
                lines.append(f"{size}  refused: {timing.refused}")
                continue
            forward = _rate(timing.forward_s, measured.flops(case, by="forward"))
            both = _rate(timing.forward_backward_s, measured.flops(case, by="forward_backward"))
            lines.append(f"{size}{forward}{both}")
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
