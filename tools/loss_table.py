"""The table of the memory of the loss: whole logits against chunks of them."""

import json
from pathlib import Path
from typing import Any

LOSS = """\
## Memory of the loss

Forward and backward of cross-entropy over a vocabulary: PyTorch's, of whole logits, and
`linear_cross_entropy`, which holds those of one chunk. *Counted* is the most that tensors take at
once above the inputs, gradients included, from a run on tensors without values. *Measured* is the
peak of a process of its own, where this machine can hold whole logits. There the CPU time of chunks
was {times} times that of whole logits, and {bits}.

| tokens | classes | width | dtype | counted: whole | chunks | ratio | measured: whole | chunks |
| --- | --- | --- | --- | --- | --- | --- | --- | --- |"""


def loss_sections(results: Path) -> list[tuple[str, list[str]]]:
    """Name and lines of the section, if its result was recorded."""
    path = results / "chunked_loss.json"
    if not path.exists():
        return []
    rows: list[dict[str, Any]] = json.loads(path.read_text())["rows"]
    measured = [row for row in rows if "measured" in row]
    ratios = [
        row["measured"]["chunked"]["cpu_s"] / row["measured"]["whole"]["cpu_s"] for row in measured
    ]
    names = {"same_loss_bits": "loss", "same_hidden_gradient_bits": "gradient of the hidden states"}
    same = [text for name, text in names.items() if all(row[name] for row in measured)]
    head = LOSS.format(
        times=" and ".join(f"{ratio:.2f}" for ratio in ratios),
        bits=f"the {' and the '.join(same)} had the same bits" if same else "no bits were the same",
    )
    return [("chunked_loss", [head, *(_row(row) for row in rows)])]


def _row(row: dict[str, Any]) -> str:
    counted = row["counted_bytes"]
    peaks = ["", ""]
    if "measured" in row:
        peaks = [_gigabytes(row["measured"][way]["peak_bytes"]) for way in ("whole", "chunked")]
    return (
        f"| {row['tokens']:,} | {row['classes']:,} | {row['width']:,} | {row['dtype']} "
        f"| {_gigabytes(counted['whole'])} | {_gigabytes(counted['chunked'])} | {row['ratio']} "
        f"| {peaks[0]} | {peaks[1]} |"
    )


def _gigabytes(count: int) -> str:
    return f"{count / 1e9:.2f} GB"
