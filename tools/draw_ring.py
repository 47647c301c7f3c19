"""The pictures of docs/context-parallel.md, which `tools.draw_design` writes."""

from dilated_core import DilatedPattern
from dilated_ring import exchange_plan

from tools.svg import BLUE, CELL, GREEN, GREY, ORANGE, box, svg, text

RED = "#e03131"


def layouts() -> str:
    """Which rank holds which position, and how much causal attention each rank then computes."""
    seq_len, num_ranks = 16, 4
    colours = (BLUE, ORANGE, GREEN, RED)
    parts = [text(20, 24, "16 positions over 4 ranks; below, the causal work of each rank")]
    for n, layout in enumerate(("contiguous", "zigzag")):
        top = 44 + 120 * n
        plan = exchange_plan(
            DilatedPattern([seq_len], [1]), seq_len, num_ranks, layout, exchange="ring",
            is_causal=True,
        )  # fmt: skip
        parts.append(text(20, top + 18, layout))
        largest = max(rank.forward_flops for rank in plan.ranks)
        for i, rank in enumerate(plan.ranks):
            for span in rank.positions:
                for position in range(*span):
                    x = 110 + position * CELL
                    parts.append(box(x, top, CELL - 2, CELL - 2, colours[i]))
                    parts.append(text(x + (4 if position > 9 else 8), top + 17, str(position)))
            width = round(300 * rank.forward_flops / largest)
            parts.append(box(110, top + 36 + 14 * i, width, 11, colours[i]))
            parts.append(text(46, top + 46 + 14 * i, f"rank {i}"))
    return svg(550, 274, parts)


def exchange() -> str:
    """Whose rows each rank needs, for branches of one, two and eight shards."""
    shard, num_ranks, cell = 64, 8, 18
    lengths = [shard, 2 * shard, 8 * shard]
    plan = exchange_plan(
        DilatedPattern(lengths, [1, 2, 8]), num_ranks * shard, num_ranks, exchange="ring",
        is_causal=True,
    )  # fmt: skip
    messages = [message for step in range(plan.num_hops) for message in plan.messages(step)]
    parts = [
        text(20, 24, "Row: the rank that attends. Column: the rank whose rows it gets. Causal.")
    ]
    for branch, w in enumerate(lengths):
        left, top = 20 + 190 * branch, 62
        count = w // shard
        plural = "s" if count > 1 else ""
        rate = plan.branches[branch].dilation_rate
        parts.append(text(left, top - 12, f"w = {count} shard{plural}, r = {rate}"))
        needed = {(x.destination, x.owner) for x in messages if x.branch == branch}
        for rank in range(num_ranks):
            for owner in range(num_ranks):
                colour = BLUE if (rank, owner) in needed else GREEN if rank == owner else GREY
                x, y = left + owner * cell, top + rank * cell
                parts.append(box(x, y, cell - 2, cell - 2, colour))
    below = 62 + num_ranks * cell + 22
    parts.append(
        text(20, below, "green: its own rows, nothing is sent; blue: kept rows of another rank")
    )
    return svg(570, below + 18, parts)
