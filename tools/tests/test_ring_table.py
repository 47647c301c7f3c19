import json

from tools.benchmark_table import RESULTS
from tools.ring_table import ring_section


def test_rows_have_shares_of_one_process_and_ratios_to_the_ring():
    result = json.loads((RESULTS / "ring.json").read_text())
    assert result["environment"]["uncommitted_changes"] is False
    row = result["rows"][0]
    sizes = {"peak_bytes": 4 * 2**20, "call_s": 0.5, "hidden": None}
    rows = [
        row | sizes | {"exchange": "ring", "ranks": 1},
        row | sizes | {"exchange": "ring", "ranks": 2, "peak_bytes": 2**20, "hidden": 0.25},
        row | sizes | {"exchange": "all_to_all", "ranks": 1},
        row | sizes | {"exchange": "all_to_all", "ranks": 2, "call_s": 0.75, "bytes": 3 * 2**20},
    ]
    lines = ring_section(rows)
    assert lines[3].endswith("| 1 MiB | 0.25 | 500 ms | 1.00 | 25% |")
    assert lines[5].startswith("| 2 | all_to_all | 3.0 MiB |")
    assert lines[5].endswith("| 4 MiB | 1.00 | 750 ms | 1.50 |  |")
