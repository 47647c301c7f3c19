"""What the rows of the GPU benchmark prove: ratios to the fused kernels, and the goals.

Pure functions of rows as gpu_attention.py writes them, so they can be applied to a committed file.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from gpu_contenders import FUSED

Row = dict[str, Any]
Values = list[tuple[float, str]]
"""A number that must reach a bound, and the row that it comes from."""

PARTS = ("forward", "forward_backward")
LEAST_RATES = {"forward": 0.75, "forward_backward": 0.65}
GATHER_SPEEDUP = 3.0
# Latency per position may grow by this from the first length to the last and still count as linear:
# more positions have room for more branches, whose keys are a few percent more FLOPs.
LINEAR_SLACK = 1.10
LINEAR_FROM = 2**17
SHOWN = (
    *(("dense_flash", "rate"), ("windows_flash", "rate"), ("dense_cudnn", "rate")),
    *(("windows_cudnn", "rate"), ("dense_cudnn", "speed"), ("gather_flash", "speed")),
)


def ratios(row: Row) -> dict[str, dict[str, dict[str, float]]]:
    """For forward and forward+backward: the fused kernels' rate and speed over each contender's.

    `rate` compares FLOPs per second, `speed` the time for the same attention (for dense attention:
    over the same sequence).
    """
    found: dict[str, dict[str, dict[str, float]]] = {}
    for part in PARTS:
        if (fused := _timed(row, FUSED, part)) is None:
            continue
        others = {name: _timed(row, name, part) for name in row["contenders"] if name != FUSED}
        found[part] = {
            name: {
                "rate": round(fused["tflops"] / other["tflops"], 4),
                "speed": round(other["median_ms"] / fused["median_ms"], 4),
            }
            for name, other in others.items()
            if other is not None
        }
    return found


def goals(rows: list[Row]) -> list[dict[str, str]]:
    """One verdict per goal: what it is, "yes", "no" or "not measured", and from which numbers."""
    rows = [row for row in rows if row["device"] == "cuda"]  # others prove nothing about speed
    kernels = ("cudnn", "flash")
    found = [
        _verdict(
            f"{part} >= {least} of the TFLOP/s of {reading}_{kernel}, w0 = 2048",
            _ratios(rows, part, f"{reading}_{kernel}", "rate", lambda row: row["w0"] == 2048),
            least,
        )
        for part, least in LEAST_RATES.items()
        for kernel in kernels
        for reading in ("dense", "windows")
    ]
    found += [
        _verdict(
            f"{part} >= {GATHER_SPEEDUP:g}x the speed of gather-attention-scatter",
            _ratios(rows, part, "gather_flash", "speed", lambda row: True),
            GATHER_SPEEDUP,
        )
        for part in PARTS
    ]
    text = "forward's peak memory <= inputs + output + lse + one float32 workspace"
    found.append(_verdict(text, _memory(rows), 1.0))
    found += [_linear(rows, part) for part in PARTS]
    found += [
        _verdict(
            f"{part} never slower than dense_{kernel} for S >= w0",
            _over_dense(rows, part, f"dense_{kernel}"),
            1.0,
        )
        for part in PARTS
        for kernel in kernels
    ]
    return found


def format_row(row: Row) -> str:
    """One line for a terminal: rates, and ratios of forward / forward+backward."""
    fused = [_timed(row, FUSED, part) for part in PARTS]
    rates = "/".join("-" if spread is None else f"{spread['tflops']:.0f}" for spread in fused)
    cells = [f"{name_of(row):<36} | {rates} TFLOP/s"]
    for peer, kind in SHOWN:
        values = [row["ratios"].get(part, {}).get(peer, {}).get(kind) for part in PARTS]
        shown = "/".join("-" if value is None else f"{value:.2f}" for value in values)
        cells.append(f"{peer} {kind} {shown}")
    return ", ".join(cells)


def name_of(row: Row) -> str:
    """The shape of a row."""
    return (
        f"S={row['seq_len']} w0={row['w0']} {row['num_heads']}x{row['head_dim']}"
        f"{' causal' if row['is_causal'] else ''}{' paper' if row['is_paper'] else ''}"
    )


def _timed(row: Row, name: str, part: str) -> dict[str, float] | None:
    spread = row["contenders"].get(name, {}).get(part)
    return spread if spread and "median_ms" in spread else None


def _ratios(
    rows: list[Row], part: str, peer: str, kind: str, wanted: Callable[[Row], bool]
) -> Values:
    return [
        (row["ratios"][part][peer][kind], name_of(row))
        for row in rows
        if wanted(row) and peer in row["ratios"].get(part, {})
    ]


def _verdict(text: str, values: Values, least: float) -> dict[str, str]:
    if not values:
        return {"goal": text, "met": "not measured", "evidence": "no row has both"}
    met = sum(value >= least for value, _ in values)
    (worst, where), (best, _) = min(values), max(values)
    return {
        "goal": text,
        "met": "yes" if met == len(values) else "no",
        "evidence": f"{met} of {len(values)} rows; from {worst:.2f} at {where} to {best:.2f}",
    }


def _memory(rows: list[Row]) -> Values:
    timed = [(row, _timed(row, FUSED, "forward")) for row in rows]
    return [
        (row["memory_goal_bytes"] / fused["peak_bytes"], name_of(row))
        for row, fused in timed
        if fused is not None
    ]


def _linear(rows: list[Row], part: str) -> dict[str, str]:
    """Time per position at the longest sequence over that at the shortest, from 128k on."""
    text = f"{part} latency linear in S to 4M positions (at most {LINEAR_SLACK:g}x per position)"
    series: dict[tuple[Any, ...], list[tuple[int, float]]] = {}
    for row in rows:
        fused = _timed(row, FUSED, part)
        if fused is not None and row["w0"] == 2048 and row["seq_len"] >= LINEAR_FROM:
            key = tuple(row[x] for x in ("num_heads", "head_dim", "is_causal", "is_paper"))
            per_position = fused["median_ms"] / row["seq_len"]
            series.setdefault(key, []).append((row["seq_len"], per_position))
    growth = {
        key: (max(points)[1] / min(points)[1], max(points)[0])
        for key, points in series.items()
        if len(points) > 1
    }
    if not any(longest == 2**22 for _, longest in growth.values()):
        return {"goal": text, "met": "not measured", "evidence": "no row of 4M positions"}
    key, (worst, longest) = max(growth.items(), key=lambda item: item[1])
    return {
        "goal": text,
        "met": "yes" if worst <= LINEAR_SLACK else "no",
        "evidence": f"{worst:.3f}x per position up to S={longest} for {key[0]}x{key[1]}",
    }


def _over_dense(rows: list[Row], part: str, peer: str) -> Values:
    values: Values = []
    for row in rows:
        # What users get: where the sequence is short, "auto" may take another backend.
        ours = _timed(row, "auto", part) or _timed(row, FUSED, part)
        dense = _timed(row, peer, part)
        if ours is not None and dense is not None and row["seq_len"] >= row["w0"]:
            # Quartiles, not medians: of two equal times one is always the larger.
            values.append((dense["high_ms"] / ours["low_ms"], name_of(row)))
    return values
