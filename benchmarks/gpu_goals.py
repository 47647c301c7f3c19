"""What the rows of the GPU benchmark say: ratios to the fused kernels, and the goals.

Pure functions of rows as gpu_attention.py writes them, so they can be applied to a committed file.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from gpu_contenders import FUSED

Row = dict[str, Any]

FORWARD_RATE, FORWARD_BACKWARD_RATE, GATHER_SPEEDUP = 0.75, 0.65, 3.0
# Latency per position may grow by this from the first length to the last and still count as linear:
# more positions have room for more branches, whose keys are a few percent more FLOPs.
LINEAR_SLACK = 1.10
LINEAR_FROM = 2**17


def ratios(row: Row) -> dict[str, dict[str, dict[str, float]]]:
    """For forward and forward+backward: the fused kernels' rate and speed over each contender's.

    `rate` compares FLOPs per second, `speed` the time for the same attention (for dense attention:
    over the same sequence).
    """
    found: dict[str, dict[str, dict[str, float]]] = {}
    for part in ("forward", "forward_backward"):
        fused = _timed(row, FUSED, part)
        if fused is None:
            continue
        found[part] = {}
        for name in row["contenders"]:
            other = _timed(row, name, part)
            if other is not None and name != FUSED:
                found[part][name] = {
                    "rate": round(fused["tflops"] / other["tflops"], 4),
                    "speed": round(other["median_ms"] / fused["median_ms"], 4),
                }
    return found


def goals(rows: list[Row]) -> list[dict[str, str]]:
    """One verdict per goal: what it is, "yes", "no" or "not measured", and from which numbers."""
    rows = [row for row in rows if row["device"] == "cuda"]  # others say nothing about speed
    found = []
    for part, least in (("forward", FORWARD_RATE), ("forward_backward", FORWARD_BACKWARD_RATE)):
        for kernel in ("cudnn", "flash"):
            for reading in ("dense", "windows", "square"):
                peer = f"{reading}_{kernel}"
                values = _values(rows, part, peer, "rate", lambda row: row["w0"] == 2048)
                text = f"{part} >= {least} of the TFLOP/s of {peer}, w0 = 2048"
                found.append(_verdict(text, values, least))
    for part in ("forward", "forward_backward"):
        values = _values(rows, part, "gather_flash", "speed", lambda row: True)
        text = f"{part} >= {GATHER_SPEEDUP:g}x the speed of gather-attention-scatter"
        found.append(_verdict(text, values, GATHER_SPEEDUP))
    found.append(_memory(rows))
    found += [_linear(rows, part) for part in ("forward", "forward_backward")]
    for part in ("forward", "forward_backward"):
        for kernel in ("cudnn", "flash"):
            found.append(_never_slower(rows, part, f"dense_{kernel}"))
    return found


def format_row(row: Row) -> str:
    """One line for a terminal."""
    forward, both = (_timed(row, FUSED, part) for part in ("forward", "forward_backward"))
    label = (
        f"{_name(row):<36} | "
        f"{forward['tflops'] if forward else float('nan'):6.1f} "
        f"{both['tflops'] if both else float('nan'):6.1f} TFLOP/s | x"
    )
    cells = []
    for peer, kind in (
        ("dense_flash", "rate"),
        ("windows_flash", "rate"),
        ("dense_cudnn", "rate"),
        ("windows_cudnn", "rate"),
        ("dense_cudnn", "speed"),
        ("gather_flash", "speed"),
    ):
        values = [
            row["ratios"].get(part, {}).get(peer, {}).get(kind)
            for part in ("forward", "forward_backward")
        ]
        shown = "/".join("-" if value is None else f"{value:.2f}" for value in values)
        cells.append(f"{peer.replace('_', ' ')} {kind} {shown}")
    return f"{label} {', '.join(cells)}"


def _timed(row: Row, name: str, part: str) -> dict[str, float] | None:
    spread = row["contenders"].get(name, {}).get(part)
    return spread if spread and "median_ms" in spread else None


def _name(row: Row) -> str:
    return (
        f"S={row['seq_len']} w0={row['w0']} {row['num_heads']}x{row['head_dim']}"
        f"{' causal' if row['is_causal'] else ''}{' paper' if row['is_paper'] else ''}"
    )


def _values(
    rows: list[Row], part: str, peer: str, kind: str, wanted: Callable[[Row], bool]
) -> list[tuple[float, str]]:
    """The ratio to a peer in every row that has it, with the row's name."""
    return [
        (row["ratios"][part][peer][kind], _name(row))
        for row in rows
        if wanted(row) and peer in row["ratios"].get(part, {})
    ]


def _verdict(text: str, values: list[tuple[float, str]], least: float) -> dict[str, str]:
    if not values:
        return {"goal": text, "met": "not measured", "evidence": "no row has both"}
    met = sum(value >= least for value, _ in values)
    worst, where = min(values)
    best, _ = max(values)
    return {
        "goal": text,
        "met": "yes" if met == len(values) else "no",
        "evidence": f"{met} of {len(values)} rows; from {worst:.2f} at {where} to {best:.2f}",
    }


def _memory(rows: list[Row]) -> dict[str, str]:
    text = "forward's peak memory <= inputs + output + lse + one float32 workspace"
    values = []
    for row in rows:
        fused = _timed(row, FUSED, "forward")
        if fused is not None and fused["peak_bytes"] is not None:
            # As a value that must be at least 1, like the other goals.
            values.append((row["memory_goal_bytes"] / fused["peak_bytes"], _name(row)))
    return _verdict(text, values, 1.0)


def _linear(rows: list[Row], part: str) -> dict[str, str]:
    """Time per position at the longest sequence over that at the shortest, from 128k on."""
    text = f"{part} latency linear in S to 4M positions (at most {LINEAR_SLACK:g}x per position)"
    series: dict[tuple[Any, ...], list[tuple[int, float]]] = {}
    for row in rows:
        fused = _timed(row, FUSED, part)
        if fused is not None and row["w0"] == 2048 and row["seq_len"] >= LINEAR_FROM:
            key = (row["num_heads"], row["head_dim"], row["is_causal"], row["is_paper"])
            per_position = fused["median_ms"] / row["seq_len"]
            series.setdefault(key, []).append((row["seq_len"], per_position))
    growth = [
        (max(points)[1] / min(points)[1], f"{key[0]}x{key[1]}{' causal' * key[2]}", max(points)[0])
        for key, points in series.items()
        if len(points) > 1
    ]
    if not any(longest == 2**22 for _, _, longest in growth):
        return {"goal": text, "met": "not measured", "evidence": "no row of 4M positions"}
    worst, where, longest = max(growth)
    return {
        "goal": text,
        "met": "yes" if worst <= LINEAR_SLACK else "no",
        "evidence": f"{worst:.3f}x per position up to S={longest} for {where}",
    }


def _never_slower(rows: list[Row], part: str, peer: str) -> dict[str, str]:
    text = f"{part} never slower than {peer} for S >= w0"
    values = []
    for row in rows:
        # What users get: where the sequence is short, "auto" may take another backend.
        ours = _timed(row, "auto", part) or _timed(row, FUSED, part)
        dense = _timed(row, peer, part)
        if ours is not None and dense is not None and row["seq_len"] >= row["w0"]:
            # Quartiles, not medians: of two equal times one is always the larger.
            values.append((dense["high_ms"] / ours["low_ms"], _name(row)))
    return _verdict(text, values, 1.0)
