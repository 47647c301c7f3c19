"""The tables of dilated-sparse, from invented results."""

from typing import Any

from tools.sparse_table import block_sparse, border_copies, hilbert


def speed(seq_len: int, kind: str, ratio: float, sparse_s: float) -> dict[str, Any]:
    part = {"dense_cpu_s": 1.0, "sparse_cpu_s": sparse_s, "speed_up": 1 / sparse_s, "efficiency": 0}
    return {
        "part": "speed",
        "seq_len": seq_len,
        "is_causal": False,
        "pattern_type": kind,
        "sparsity_ratio": ratio,
        "kept": ratio,
        "mass": 0.25,
        "head_dim": 64,
        "block_size": 64,
        "dtype": "float32",
        "forward": part,
        "backward": part,
    }


def test_crossovers_are_the_lengths_behind_the_last_slower_one() -> None:
    rows = [
        speed(seq_len, kind, ratio, seconds[i])
        for kind, ratio, seconds in (
            ("a", 0.1, (0.5, 2.0, 0.5, 0.25)),
            ("a", 0.02, (0.5, 0.5, 0.5, 0.5)),
            ("b", 0.1, (0.5, 0.5, 0.5, 2.0)),
            ("b", 0.02, (2.0, 0.5, 0.5, 0.2)),
        )
        for i, seq_len in enumerate((1024, 2048, 4096, 8192))
    ]
    lines = block_sparse(rows)
    assert "| `a` | 4,096 | 1,024 |" in lines
    assert "| `b` | none | 2,048 |" in lines
    assert "| 8,192 | full | `a` | 10.0% | 4.0 (0.00) | 4.0 (0.00) | 25.0% |" in lines
    assert not any(line.startswith("| 1,024 | full") for line in lines)


def test_accuracies_are_medians_over_seeds() -> None:
    model = {"segment_lengths": [8, 32], "dilation_rates": [1, 4], "num_tokens": 64}
    rows = [
        {
            "contender": name,
            "seed": seed,
            "steps": 10,
            "tokens": 100,
            "model": model | ({"segment_lengths": [8, 12, 32]} if name == "two borders" else {}),
            "accuracy": [{"distances": [1, 3], "places": [0, 7], "accuracy": accuracy}],
        }
        for name, accuracies in (("LongNet", (0.1, 0.9, 0.2)), ("two borders", (0.5, 0.6, 0.7)))
        for seed, accuracy in enumerate(accuracies)
    ]
    lines = border_copies(rows)
    assert lines[-1] == "| 1 to 3 | 0 to 7 | 20% | 60% |"
    assert "Median of 3 seeds" in lines[0]
    assert "segments of\n12;" in lines[0]


def test_orders_have_a_table_each() -> None:
    rows = [
        {
            "part": "locality",
            "grid": "square",
            "tokens": 16,
            "segment": 4,
            "hilbert": 0.8,
            "row_by_row": 0.5,
        },
        {
            "part": "tile_orders",
            "seq_len": 1024,
            "tile": 64,
            "is_causal": True,
            "num_heads": 4,
            "head_dim": 64,
            "dtype": "float32",
            "ratio": {"low": 0.98, "median": 1.0, "high": 1.04},
        },
    ]
    lines = hilbert(rows)
    assert "| square | 16 | 4 | 80.0% | 50.0% |" in lines
    assert lines[-1] == "| 1,024 | 64 | causal | 1.00 (0.98 to 1.04) |"
