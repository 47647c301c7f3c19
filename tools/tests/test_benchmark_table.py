import json
import shutil

import pytest

from tools.benchmark_table import RESULTS, duration, main, page, positions


def test_the_committed_page_is_current(capsys):
    assert main(["--check"]) == 0, capsys.readouterr().out


def test_a_changed_result_is_noticed(tmp_path):
    results = tmp_path / "results"
    shutil.copytree(RESULTS, results)
    for name, change in (
        ("length.json", lambda row: row["dilated"].update(best_s=0.0777)),
        ("equal_flops_float32.json", lambda row: row["forward"].update(ratio_to_windows=9.87)),
        ("training_run.json", lambda row: row.update(seconds=12345)),
        ("breakdown.json", lambda row: row["share_of_call"].update(merge=0.4321)),
        ("short_sequences.json", lambda row: row["forward"].update(extra_us=98765)),
        ("context_gain.json", lambda row: row.update(num_targets=1234567)),
        ("generation.json", lambda row: row["token"].update(median_cpu_s=0.0123)),
    ):
        result = json.loads((results / name).read_text())
        change(result["rows"][0])
        (results / name).write_text(json.dumps(result))
        assert main(["--check", "--results", str(results)]) == 1
    assert "| 1,024 | 78 ms |" in page(results)
    assert "| 9.87 |" in page(results)
    assert "| 12345 s |" in page(results)
    assert "| 43.2% |" in page(results)
    assert "| cache | 12 ms |" in page(results)
    assert "1,234,567 targets" in page(results)
    assert "(+98765 µs)" in page(results)


def test_extrapolated_numbers_are_marked(tmp_path):
    results = tmp_path / "results"
    shutil.copytree(RESULTS, results)
    result = json.loads((results / "length.json").read_text())
    row = result["rows"][0]
    row |= {"seq_len": 2**20, "dilated": {"best_s": 4.0, "peak_bytes": 3 * 2**30}}
    row["dense"] = {"best_s": 7300.0, "peak_bytes": 2**30, "extrapolated": True}
    (results / "length.json").write_text(json.dumps(result | {"rows": [row]}))
    text = page(results)
    assert "| 1,048,576 | 4 s | ≈ 2 h | ≈ 1,800 | 3,072 MiB | ≈ 1,024 MiB |" in text
    assert text.index("## Against length") < text.index("## Against PyTorch's attention at equal")


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(0.00456, "4.6 ms"), (0.131, "130 ms"), (1.0, "1 s"), (59.6, "60 s"), (3600, "1 h")],
)
def test_durations(seconds, words):
    assert duration(seconds) == words


def test_positions():
    assert [positions(n) for n in (512, 1024, 65536, 2**20)] == ["512", "1k", "64k", "1M"]


def test_streaming_has_a_section_once_it_was_measured(tmp_path):
    results = tmp_path / "results"
    shutil.copytree(RESULTS, results)
    (results / "streaming.json").unlink(missing_ok=True)
    assert "Sequences larger than memory" not in page(results)
    environment = json.loads((RESULTS / "training_run.json").read_text())["environment"]
    row = {
        "rows": "generated",
        "seq_len": 10**9,
        "seconds": 200.0,
        "tokens_per_second": 5000000,
        "tokens_per_second_by_tenth": [4900000, 5100000],
        "source_seconds": 10.0,
        "sink_seconds": 4.0,
        "peak_memory_bytes": 700 * 2**20,
        "memory_above_start_bytes": 12 * 2**20,
        "checksum": 1,
    }
    result = {"environment": environment, "rows": [row, row | {"rows": "files"}]}
    (results / "streaming.json").write_text(json.dumps(result))
    text = page(results)
    assert "| 5,000,000 | 4,900,000 to 5,100,000 | 7% | 12 MiB | 700 MiB |" in text
    assert "| 1,000,000,000 | files | 5,000,000 |" in text
    assert text.index("## Sequences larger than memory") < text.index("## The default training")


@pytest.mark.parametrize("path", sorted(RESULTS.glob("*.json")), ids=lambda path: path.stem)
def test_results_are_of_committed_code(path):
    environment = json.loads(path.read_text())["environment"]
    assert environment["uncommitted_changes"] is False
    assert len(environment["commit"]) >= 7
