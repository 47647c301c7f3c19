"""Problems in parts, so that what a backend returns for one is small beside a shard."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from dilated_core import Problem

_MOST_PARTS = 16
_FEWEST_ROWS = 4096
"""A part of fewer rows would cost more calls than it saves memory."""


def in_parts(problems: Iterable[Problem], num_rows: int) -> tuple[Problem, ...]:
    """The problems, cut at segments, batch rows and heads of k where they are large.

    Args:
        problems: Of a plan.
        num_rows: Batch rows x positions x heads of the queries of a rank. A 16th of this is large.
    """
    limit = max(_FEWEST_ROWS, num_rows // _MOST_PARTS)
    parts: list[Problem] = []
    for problem in problems:
        count = problem.queries.num_elements
        if count <= limit:
            parts.append(problem)
            continue
        step = max(1, problem.queries.num_problems * limit // count)
        for part in problem.split(step):
            parts.extend(_by_heads(part) if part.queries.num_elements > limit else [part])
    return tuple(parts)


def _by_heads(problem: Problem) -> list[Problem]:
    """A problem for each head of k."""
    queries, keys = problem.queries, problem.keys
    if keys.num_heads == 1:
        return [problem]
    group = queries.num_heads // keys.num_heads
    return [
        replace(problem, queries=queries.of_heads(i * group, group), keys=keys.of_heads(i, 1))
        for i in range(keys.num_heads)
    ]
