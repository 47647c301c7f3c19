"""The section of docs/benchmarks.md about attention over ranks, from `results/ring.json`."""

from typing import Any

RING = """\
## Over ranks

Causal attention forward and backward over {seq_len:,} positions, {num_heads} heads of {head_dim},
{dtype}, on gloo processes of one thread each: segments of {segments} with rates {rates}, and *dense
ring*: one branch with w = S and r = 1. Bytes are those that all ranks send. *Memory* is the peak of
a rank with inputs and results, and as a share of the same call on one process. *Time* is that of
the slowest rank, the median of {rounds} rounds in turn; *against ring* compares it with the first
exchange on as many ranks. *Hidden* is the share of the messages' own time that the call does not
take longer than its computation, which is timed with a transport that sends nothing; it is left out
where the times of calls are spread more than messages take. The processes share the cores of one
machine, and carrying messages takes these cores too: below 0, messages cost more within a call than
alone. Nothing here was measured on GPUs.

"""


def ring_section(rows: list[dict[str, Any]]) -> list[str]:
    """The lines of the section, without where it was measured."""
    first = rows[0]
    heading = RING.format(
        **first,
        segments=", ".join(f"{w:,}" for w in first["segment_lengths"]),
        rates=", ".join(map(str, first["dilation_rates"])),
    )
    alone = {row["exchange"]: row["peak_bytes"] for row in rows if row["ranks"] == 1}
    ring = {row["ranks"]: row["call_s"] for row in rows if row["exchange"] == "ring"}
    return [
        heading + "| ranks | exchange | sent | hops | memory of a rank | of one process "
        "| time | against ring | hidden |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
        *(
            _row(
                row, row["peak_bytes"] / alone[row["exchange"]], row["call_s"] / ring[row["ranks"]]
            )
            for row in rows
        ),
    ]


def _row(row: dict[str, Any], share: float, ratio: float) -> str:
    hidden = row["hidden"]
    cells = [
        row["ranks"],
        row["exchange"],
        f"{row['bytes'] / 2**20:.1f} MiB",
        row["hops"],
        f"{row['peak_bytes'] / 2**20:.0f} MiB",
        f"{share:.2f}",
        f"{1e3 * row['call_s']:.0f} ms",
        f"{ratio:.2f}",
        "" if hidden is None else f"{hidden:.0%}",
    ]
    return f"| {' | '.join(map(str, cells))} |"
