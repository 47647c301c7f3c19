"""Run a benchmark and write its result: `python benchmarks/run.py --help`."""

from __future__ import annotations

import argparse
from pathlib import Path

import equal_flops
from harness import write_result

RESULTS = Path(__file__).parent / "results"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--max-rounds", type=int, default=9, help="timed rounds of a contender")
    parser.add_argument("--seconds", type=float, default=60, help="time for a case, but 3 rounds")
    parser.add_argument("--seq-len", type=int, nargs="*", help="only these sequence lengths")
    parser.add_argument("--w0", type=int, nargs="*", help="only these first segment lengths")
    parser.add_argument("--dtype", choices=equal_flops.DTYPES, default="float32")
    parser.add_argument("--causal", type=int, nargs="*", choices=(0, 1), help="only these")
    parser.add_argument("--out", type=Path, help="results/equal_flops_DTYPE.json if not given")
    options = parser.parse_args()
    out = options.out or RESULTS / f"equal_flops_{options.dtype}.json"
    wanted = {
        "seq_len": options.seq_len,
        "w0": options.w0,
        "dtype": [options.dtype],
        "is_causal": options.causal,
    }
    rows = []
    for case in equal_flops.CASES:
        if any(values and case[name] not in values for name, values in wanted.items()):
            continue
        row = equal_flops.measure(**case, max_rounds=options.max_rounds, seconds=options.seconds)
        rows.append(row)
        print(
            f"S={case['seq_len']:>6} w0={case['w0']:>4} {case['dtype']:<8} "
            f"{'causal' if case['is_causal'] else 'full  '} | rate over windows: forward "
            f"{row['forward']['ratio_to_windows']:.2f}, forward+backward "
            f"{row['forward_backward']['ratio_to_windows']:.2f} | over square: "
            f"{row['forward']['ratio_to_square']:.2f}, "
            f"{row['forward_backward']['ratio_to_square']:.2f} | forward peak "
            f"{row['forward_peak']['ratio']:.2f} × output",
            flush=True,
        )
        # Written as it grows, so that a long run that is stopped leaves what it measured.
        write_result(out, "equal_flops", rows)


if __name__ == "__main__":
    main()
