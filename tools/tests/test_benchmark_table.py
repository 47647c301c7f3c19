import json

from tools.benchmark_table import RESULTS, main, page


def test_the_committed_page_is_current(capsys):
    assert main(["--check"]) == 0, capsys.readouterr().out


def test_a_changed_result_is_noticed(tmp_path):
    result = json.loads((RESULTS / "equal_flops.json").read_text())
    result["rows"][0]["forward"]["ratio_to_windows"] = 9.87
    (tmp_path / "equal_flops.json").write_text(json.dumps(result))
    assert "| 9.87 |" in page(tmp_path)
    assert main(["--check", "--results", str(tmp_path)]) == 1


def test_results_are_of_committed_code():
    result = json.loads((RESULTS / "equal_flops.json").read_text())
    assert result["environment"]["uncommitted_changes"] is False
    assert len(result["environment"]["commit"]) >= 7
