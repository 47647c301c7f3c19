"""How every check ends: one line per problem and exit code 1, or one line of good news."""

import sys
from collections.abc import Sequence


def report(problems: Sequence[str], good: str = "") -> int:
    """Print the outcome and return the exit code."""
    for problem in problems:
        print(f"error: {problem}", file=sys.stderr)
    if not problems:
        print(good)
    return 1 if problems else 0
