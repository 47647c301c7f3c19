import json
import shutil

import pytest

from tools.benchmark_table import RESULTS, main, page


def test_the_committed_page_is_current(capsys):
    assert main(["--check"]) == 0, capsys.readouterr().out


def test_a_changed_result_is_noticed(tmp_path):
    results = tmp_path / "results"
    shutil.copytree(RESULTS, results)
    for name, change in (
        ("equal_flops_float32.json", lambda row: row["forward"].update(ratio_to_windows=9.87)),
        ("training_run.json", lambda row: row.update(seconds=12345)),
    ):
        result = json.loads((results / name).read_text())
        change(result["rows"][0])
        (results / name).write_text(json.dumps(result))
        assert main(["--check", "--results", str(results)]) == 1
    assert "| 9.87 |" in page(results)
    assert "| 12345 s |" in page(results)


@pytest.mark.parametrize("path", sorted(RESULTS.glob("*.json")), ids=lambda path: path.stem)
def test_results_are_of_committed_code(path):
    environment = json.loads(path.read_text())["environment"]
    assert environment["uncommitted_changes"] is False
    assert len(environment["commit"]) >= 7
