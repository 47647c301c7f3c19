"""The page about the LongNet paper shows what the results hold."""

import json

import pytest

from tools import longnet_paper_page
from tools.line_plot import Point, Tick, line_plot, round_ticks
from tools.packages import ROOT

ENVIRONMENT = dict.fromkeys(
    ("machine", "cores", "system", "python", "torch", "commit", "date"), "x"
)


def trained(contender, seed, kind, seq_len, bits):
    """A row of the part about quality."""
    contexts = [16, 2048]
    return {
        "contender": contender,
        "kind": kind,
        "seq_len": seq_len,
        "seed": seed,
        "scale": 1,
        "steps": 5,
        "tokens": 100,
        "parameters": 7,
        "mean_keys": 64.5,
        "columns": 3,
        "targets": 40,
        "targets_by_context": 20,
        "model": {"num_decoder_layers": 2, "d_model": 64, "nhead": 8},
        "by_window": [{"window": w, "bits_per_byte": bits} for w in (128, 512, 2048)],
        "by_context": [{"context": c, "bits_per_byte": bits} for c in contexts],
        "gradient_error": {
            "before": {"all": 0.25, "keys": 0.5},
            "after": {"all": 0.1, "keys": 0.2},
        },
    }


def quality_rows(bits):
    kinds = [("dense", 128), ("fixed-sparse", 512), ("LongNet", 512), ("fixed-sparse", 2048)]
    kinds += [("LongNet", 2048), ("detached", 2048)]
    return [
        trained(f"{kind}, {seq_len}", seed, kind, seq_len, bits[kind] + seed / 10)
        for seed in (0, 1, 2)
        for kind, seq_len in kinds
    ]


def strided_rows():
    def entries(share):
        return [
            {"distances": d, "residue": r, "places": p, "right": share(d, r, p), "total": 10}
            for d in ([8, 15], [32, 63])
            for r in range(4)
            for p in ([0, 7], [8, 31])
        ]

    model = {"d_model": 48, "num_tokens": 32, "segment_lengths": [32], "dilation_rates": [1]}
    shares = {
        "dense": lambda d, r, p: 10,
        "LongNet": lambda d, r, p: 8 if d[0] == 8 else 2 * (r == 0),
    }
    return [
        {
            "contender": name,
            "seed": seed,
            "steps": 4,
            "tokens": 8,
            "model": model,
            "accuracy": entries(share),
        }
        for seed in (0, 1)
        for name, share in shares.items()
    ]


def latency_rows():
    def row(seq_len, seconds, extrapolated):
        dense = {"cpu_s": [] if extrapolated else [seconds], "best_cpu_s": seconds}
        return {
            "seq_len": seq_len,
            "batch_size": 4096 // seq_len,
            "num_heads": 2,
            "head_dim": 64,
            "dtype": "float32",
            "segment_lengths": [128],
            "dilation_rates": [1],
            "dilated": {"cpu_s": [0.5, 0.6], "best_cpu_s": 0.5, "extrapolated": False},
            "dense": dense | {"extrapolated": extrapolated},
        }

    return [row(512, 1.0, False), row(4096, 8.0, True)]


@pytest.fixture
def written(tmp_path):
    """Page and pictures of some rows."""

    def write(**parts):
        for part, rows in parts.items():
            result = {"environment": ENVIRONMENT, "rows": rows}
            (tmp_path / f"longnet_paper_{part}.json").write_text(json.dumps(result))
        return longnet_paper_page.page(tmp_path)

    return write


def test_the_page_and_its_plots_are_up_to_date():
    assert longnet_paper_page.main(["--check"]) == 0


def test_results_come_from_a_clean_tree():
    for path in (ROOT / "benchmarks" / "results").glob("longnet_paper_*.json"):
        assert json.loads(path.read_text())["environment"]["uncommitted_changes"] is False, path


def test_table_two_has_medians_and_the_spread_of_the_seeds(written):
    bits = {"dense": 2.0, "fixed-sparse": 3.0, "LongNet": 1.5, "detached": 1.75}
    text, pictures = written(quality=quality_rows(bits))
    assert "| dense, 128 | 64 | 2.100 (2.000 to 2.200) |" in text
    assert "| 4.37 / 3.33 / 3.01 |" in text
    assert "- below that of *fixed-sparse, 2048* in 3 of 3 seeds, by 1.500" in text
    assert "- below that of *LongNet, 512* in 0 of 3 seeds, by 0.000" in text
    assert "| 2,048 | 1.600 (1.500 to 1.700) | 1.850 (1.750 to 1.950) | +0.2500 (" in text
    assert "| all parameters | 25.0% (25.0% to 25.0%) | 10.0% (10.0% to 10.0%) |" in text
    assert "3 seeds. Measured on x" in text
    assert list(pictures) == ["longnet-paper-windows.svg"]


def test_strided_branches_are_shown_by_place_and_residue(written):
    text, pictures = written(strided=strided_rows())
    assert "| 8 to 15 | 0 to 7 | 100% (100% to 100%) | 80% (80% to 80%) |" in text
    assert "| 32 to 63 | 8 to 31 | 100% (100% to 100%) | 5% (5% to 5%) |" in text
    assert "| 0 | rates 2 and 4 | 100% (100% to 100%) | 20% (20% to 20%) |" in text
    assert "| 2 | rate 2 | 100% (100% to 100%) | 0% (0% to 0%) |" in text
    assert "2 seeds." in text
    assert "learnt to copy, and the others have not." in text
    rows = strided_rows()
    for row in rows:
        for entry in row["accuracy"]:
            entry["right"] //= 4
    assert "says nothing about what strided branches learn" in written(strided=rows)[0]
    assert "LongNet" in pictures["longnet-paper-strided.svg"]


def test_extrapolated_times_are_marked(written):
    text, pictures = written(latency=latency_rows())
    assert "| 8 × 512 | 500 ms | 1 s | 2 |" in text
    assert "| 1 × 4,096 | 500 ms | ≈ 8 s | ≈ 16 |" in text
    assert pictures["longnet-paper-latency.svg"].count("stroke-dasharray") == 1


def test_a_plot_shows_each_point_at_its_place():
    points = [Point(1, 10, 10, 10), Point(10, 20, 20, 20), Point(100, 30, 30, 30)]
    ticks = [Tick(1, "one"), Tick(100, "hundred")]
    svg = line_plot(
        "t", "s", {"a": points, "b": points}, x_ticks=ticks, y_ticks=round_ticks(10, 30),
        x_label="x", logarithmic=(True, False),
    )  # fmt: skip
    circles = [part.split('"')[1::2][:2] for part in svg.split("<circle ")[1:]]
    x, y = ([float(c[i]) for c in circles[:3]] for i in (0, 1))
    assert x[1] - x[0] == pytest.approx(x[2] - x[1], abs=0.2)
    assert y[0] - y[1] == pytest.approx(y[1] - y[2], abs=0.2)
    assert y[2] < y[0]
    names = [float(part.split('y="')[1].split('"')[0]) for part in svg.split("<text ")[-2:]]
    assert names[1] - names[0] >= 17


@pytest.mark.parametrize(("low", "high"), [(2.41, 2.93), (0, 100), (0.001, 0.0013), (3, 3)])
def test_round_ticks_span_the_values(low, high):
    ticks = round_ticks(low, high)
    assert ticks[0].place <= low <= high <= ticks[-1].place
    assert 1 <= len(ticks) <= 9
