"""Streamed attention of up to a billion positions: rate and peak memory at each length.

`python benchmarks/streaming.py` writes results/streaming.json. Each length runs in a process of its
own: rows that are computed as they are asked for, into a checksum; and rows from files to a file.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from dilated_core import (
    DilatedPattern,
    MappedTensor,
    dilated_attention_streamed,
    reference_dilated_attention,
    tensor_sink,
    tensor_source,
)
from harness import high_water_bytes, peak_memory_in_fresh_process, reset_high_water, write_result

RESULT = Path(__file__).parent / "results" / "streaming.json"
PATTERN = DilatedPattern([64, 128, 256], [1, 2, 4])
HEAD_DIM = 16  # one head
# The second length once more at the end: what the machine's own drift does to a rate.
LENGTHS = (10**6, 10**7, 10**8, 10**9, 10**7)
FILE_LENGTHS = (5 * 10**7,)


class Timed:
    """A source or a sink with the seconds spent in it."""

    def __init__(self, function: Any) -> None:
        self.function, self.seconds = function, 0.0

    def __call__(self, *arguments: Any) -> Any:
        """What the function returns."""
        start = time.perf_counter()
        result = self.function(*arguments)
        self.seconds += time.perf_counter() - start
        return result


class Tenths:
    """Progress callback that keeps the rate of each tenth of a run."""

    def __init__(self, seq_len: int) -> None:
        self.step = seq_len // 10
        self.done, self.time = 0, time.perf_counter()
        self.rates: list[int] = []

    def __call__(self, done: int, total: int) -> None:
        """Called with positions after each range."""
        if done - self.done >= self.step or done == total:
            now = time.perf_counter()
            self.rates.append(round((done - self.done) / (now - self.time)))
            self.done, self.time = done, now


class GeneratedRows:
    """q, k, v by arithmetic on the position: float32 `(1, n, 1, 16)` between −0.5 and 0.5."""

    def __init__(self) -> None:
        self.steps = torch.arange(1, 3 * HEAD_DIM + 1).sqrt().frac()

    def __call__(self, start: int, stop: int) -> tuple[torch.Tensor, ...]:
        """The rows of the positions from `start` to `stop`."""
        # The remainder is a number that float32 holds exactly, however large the position.
        position = torch.arange(start, stop).remainder_(65521).float()
        numbers = torch.outer(position, self.steps).frac_().sub_(0.5)
        return numbers[None, :, None, :].split(HEAD_DIM, dim=-1)


class ChecksumSink:
    """The sum of the results' bit patterns: the same in any order and grouping."""

    def __init__(self) -> None:
        self.value = 0

    def __call__(self, start: int, stop: int, out: torch.Tensor) -> None:
        """Add the results of a range."""
        self.value += int(out.contiguous().view(torch.int32).sum(dtype=torch.int64))


def check() -> None:
    """Compare a short stream with the definition, before anything is timed."""
    q, k, v = (x.contiguous() for x in GeneratedRows()(0, 1000))
    out = torch.empty_like(q)
    dilated_attention_streamed(
        GeneratedRows(), tensor_sink(out), PATTERN, seq_len=1000, chunk_length=256
    )
    error = (out - reference_dilated_attention(q, k, v, PATTERN)).abs().max()
    if not error < 1e-6:
        raise RuntimeError(f"streamed attention is off by {error}; a wrong result is not timed.")


def measure(kind: str, seq_len: int, folder: Path) -> dict[str, Any]:
    """One run in this process, which should be a fresh one."""
    check()
    if kind == "generated":
        source, sink = Timed(GeneratedRows()), Timed(ChecksumSink())
    else:
        shape = (1, seq_len, 1, HEAD_DIM)
        files = [MappedTensor(folder / n, shape, torch.float32, mode="w") for n in "qkv"]
        for start in range(0, seq_len, 2**16):
            stop = min(start + 2**16, seq_len)
            for file, rows in zip(files, GeneratedRows()(start, stop), strict=True):
                file.rows(start, stop).copy_(rows)
        out = MappedTensor(folder / "out", shape, torch.float32, mode="w")
        source, sink = Timed(tensor_source(*files)), Timed(tensor_sink(out))
    reset_high_water()
    before = high_water_bytes()
    start = time.perf_counter()
    journal = folder / "journal" if kind == "files" else None
    tenths = Tenths(seq_len)
    dilated_attention_streamed(
        source, sink, PATTERN, seq_len=seq_len, journal=journal, progress=tenths
    )
    seconds = time.perf_counter() - start
    peak = high_water_bytes()
    checksum = ChecksumSink()
    if kind == "files":
        for start in range(0, seq_len, 2**16):
            checksum(start, 0, out.rows(start, min(start + 2**16, seq_len)))
    else:
        checksum = sink.function
    return {
        "rows": kind,
        "seq_len": seq_len,
        "seconds": round(seconds, 2),
        "tokens_per_second": round(seq_len / seconds),
        "tokens_per_second_by_tenth": tenths.rates,
        "source_seconds": round(source.seconds, 2),
        "sink_seconds": round(sink.seconds, 2),
        "peak_memory_bytes": peak,
        "memory_above_start_bytes": peak - before,
        "checksum": checksum.value,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--lengths", type=int, nargs="*", default=LENGTHS, help="generated rows")
    parser.add_argument("--file-lengths", type=int, nargs="*", default=FILE_LENGTHS)
    parser.add_argument("--folder", type=Path, help="where the files go; 256 bytes per position")
    parser.add_argument("--out", type=Path, default=RESULT)
    parser.add_argument("--measure", nargs=2, metavar=("KIND", "LENGTH"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        kind, length = options.measure
        print(json.dumps(measure(kind, int(length), options.folder)))
        return
    rows: list[dict[str, Any]] = []
    runs = [("generated", n) for n in options.lengths] + [
        ("files", n) for n in options.file_lengths
    ]
    for kind, length in runs:
        with tempfile.TemporaryDirectory(dir=options.folder) as folder:
            rows.append(
                peak_memory_in_fresh_process(
                    "streaming.py", "--folder", folder, "--measure", kind, str(length)
                )
            )
        print(json.dumps(rows[-1]), flush=True)
        # Written as it grows, so that a long run that is stopped leaves what it measured.
        write_result(options.out, "streaming", rows)


if __name__ == "__main__":
    main()
