"""An exchange plan as text: its costs, and who sends what to whom."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from dilated_ring.plan.traffic import format_bytes

if TYPE_CHECKING:
    from dilated_ring.plan.cost import ExchangePlan

_MOST_RANKS = 16
"""Tables list so many ranks; beyond, the first and the last ones. Messages are then left out."""

_MOST_MESSAGES = 40


def plan_table(plan: ExchangePlan) -> str:
    """The plan as tables of branches, ranks and messages."""
    sent = {"alone": "nothing", "rows": "rows of k and v", "heads": "heads of all positions"}
    lines = [
        f"{plan.seq_len:,} positions over {plan.cp_size:,} ranks, {plan.layout}, "
        f"{'causal' if plan.is_causal else 'not causal'}",
        f"exchange={plan.exchange!r} sends {sent[plan.way]}: {plan.reason}",
        f"forward {format_bytes(plan.forward_bytes)} in {plan.num_hops:,} hops, backward "
        f"{format_bytes(plan.backward_bytes)}; gathering k and v whole: "
        f"{format_bytes(sum(plan.gathering_bytes))}",
        f"balance of FLOPs, mean over largest: {plan.balance:.2f}",
        "",
        *(_branches(plan) if plan.branches else ()),
        *_columns(["rank", "positions", "forward", "backward", "peers", "FLOPs"], _ranks(plan)),
    ]  # fmt: skip
    if plan.num_hops and plan.cp_size <= _MOST_RANKS:
        lines += ["", *_messages(plan)]
    return "\n".join(lines)


def _branches(plan: ExchangePlan) -> list[str]:
    table = _columns(
        ["branch", "w", "r", "sends"],
        [
            [str(i), f"{branch.segment_length:,}", f"{branch.dilation_rate:,}",
             "nothing: local" if branch.is_local
             else "with its heads" if plan.way == "heads"
             else format_bytes(branch.forward_bytes)]
            for i, branch in enumerate(plan.branches)
        ],
    )  # fmt: skip
    return [*table, ""]


def _ranks(plan: ExchangePlan) -> list[list[str]]:
    rows = [
        [
            str(i),
            f"{rank.num_positions:,}",
            format_bytes(rank.forward_bytes),
            format_bytes(rank.backward_bytes),
            f"{rank.peers:,}",
            f"{rank.forward_flops:.3g}",
        ]
        for i, rank in enumerate(plan.ranks)
    ]
    if len(rows) <= _MOST_RANKS:
        return rows
    return [*rows[: _MOST_RANKS // 2], ["…"] * 6, *rows[-_MOST_RANKS // 2 :]]


def _messages(plan: ExchangePlan) -> list[str]:
    messages = [message for step in range(plan.num_hops) for message in plan.messages(step)]
    table = _columns(
        ["hop", "from", "to", "branch", "positions", "bytes"],
        [
            [
                str(x.step + 1),
                str(x.source),
                str(x.destination),
                str(x.branch) if x.branch is not None else "all" if plan.branches else "blocks",
                f"{x.positions.start:,} to {x.positions.stop:,}",
                format_bytes(x.num_bytes),
            ]
            for x in messages[:_MOST_MESSAGES]
        ],
    )
    left = len(messages) - _MOST_MESSAGES
    return [*table, f"… and {left:,} messages"] if left > 0 else table


def _columns(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Columns of equal width, right-aligned."""
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    return [
        "  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True))
        for row in (head, *rows)
    ]
