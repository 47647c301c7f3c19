"""The end of what `gpu_check` prints: everything that matters, in few lines."""

from __future__ import annotations

from typing import Any

MAX_PROBLEMS = 40

_COLUMNS = (
    ("dense_flash", "rate"),
    ("dense_cudnn", "rate"),
    ("windows_flash", "rate"),
    ("windows_cudnn", "rate"),
    ("dense_cudnn", "speed"),
    ("gather_flash", "speed"),
    ("sdpa", "speed"),
    ("triton_hilbert", "speed"),
)


def summary_lines(report: dict[str, Any]) -> list[str]:
    """Machine, tests, accuracy, table, goals, problems and the verdict."""
    phases = report["phases"]
    lines = ["", *_machine(report["environment"])]
    if "tests" in phases:
        lines += [_tests(name, package) for name, package in phases["tests"]["packages"].items()]
    if "accuracy" in phases:
        rows = phases["accuracy"].get("rows", [])
        compared = sum("errors" in row for row in rows)
        backends = sorted({row["backend"] for row in rows})
        lines.append(f"accuracy: {compared} comparisons of {', '.join(backends)}")
    if "benchmark" in phases:
        lines += _table(phases["benchmark"])
    problems = [problem for phase in phases.values() for problem in phase["problems"]]
    lines += [f"PROBLEM: {problem[:300]}" for problem in problems[:MAX_PROBLEMS]]
    if len(problems) > MAX_PROBLEMS:
        lines.append(f"and {len(problems) - MAX_PROBLEMS} more problems, in the report")
    verdict = "all results are right" if not problems else f"{len(problems)} problems"
    lines.append(f"RESULT: {verdict}, after {report['seconds']:.0f} s")
    return lines


def _machine(environment: dict[str, Any] | None) -> list[str]:
    if environment is None:
        return ["the machine could not be described"]
    versions = ", ".join(f"{name} {environment.get(name)}" for name in ("torch", "triton"))
    lines = [f"{environment['gpu'] or 'CPU, kernels interpreted'}; {versions}"]
    if ceilings := environment.get("ceilings"):
        lines.append(", ".join(f"{name} {value}" for name, value in ceilings.items()))
    return lines


def _tests(name: str, package: dict[str, Any]) -> str:
    counts = [
        f"{len(value) if isinstance(value, dict) else value} {kind.replace('_', ' ')}"  # pyright: ignore[reportUnknownArgumentType]
        for kind, value in package.items()
        if kind not in ("details", "slowest_s", "warnings") and (value or kind == "passed")
    ]
    return f"tests of {name}: {', '.join(counts)}, {len(package['warnings'])} warnings"


def _table(phase: dict[str, Any]) -> list[str]:
    """The fused kernels' rate, and their ratio to others, forward / forward+backward."""
    heads = [f"{peer.replace('_', ' ')} {kind}" for peer, kind in _COLUMNS]
    lines = [f"S w0 heads | TFLOP/s | {' | '.join(heads)} | memory/goal"]
    for row in phase.get("rows", []):
        fused = row["contenders"].get("triton", {})
        parts = [fused.get(part, {}) for part in ("forward", "forward_backward")]
        rates = "/".join(f"{part['tflops']:.0f}" if "tflops" in part else "-" for part in parts)
        cells = [_pair(row["ratios"], peer, kind) for peer, kind in _COLUMNS]
        peak = parts[0].get("peak_bytes")
        memory = f"{peak / row['memory_goal_bytes']:.2f}" if peak else "-"
        causal = " causal" if row["is_causal"] else ""
        label = f"{row['seq_len']} {row['w0']} {row['num_heads']}x{row['head_dim']}{causal}"
        label += " paper" if row["is_paper"] else ""
        lines.append(f"{label} | {rates} | {' | '.join(cells)} | {memory}")
    if missing := phase.get("rows_not_measured"):
        lines.append(f"{missing} rows not measured: out of time")
    for goal in phase.get("goals", []):
        lines.append(f"goal met: {goal['met']}: {goal['goal']} ({goal['evidence']})")
    return lines


def _pair(ratios: dict[str, Any], peer: str, kind: str) -> str:
    values = [
        ratios.get(part, {}).get(peer, {}).get(kind) for part in ("forward", "forward_backward")
    ]
    return "/".join("-" if value is None else f"{value:.2f}" for value in values)
