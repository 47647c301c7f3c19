"""What tests of this family share; needs the extra `testing` (pytest, hypothesis).

`cases` are the shapes that break careless code. `error_budget` bounds the distance of a result from
the oracle. `drawn_positions` checks results that are too long for the oracle. `conformance` is the
suite that every backend must pass. `processes` runs a function on several ranks.
"""

from dilated_core.testing.cases import AWKWARD_CASES, Case, random_cases
from dilated_core.testing.conformance import BackendConformance
from dilated_core.testing.drawn_positions import errors_at_drawn_positions
from dilated_core.testing.error_budget import assert_within_budget, relative_error
from dilated_core.testing.processes import run_processes

__all__ = [
    "AWKWARD_CASES",
    "BackendConformance",
    "Case",
    "assert_within_budget",
    "errors_at_drawn_positions",
    "random_cases",
    "relative_error",
    "run_processes",
]
