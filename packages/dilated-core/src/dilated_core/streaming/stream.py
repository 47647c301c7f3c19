"""Dilated attention over sequences larger than memory: rows stream in, results stream out.

A segment attends within itself, so its results can be computed as soon as its last row is read.
A window holds the latest rows. Each step reads a chunk, runs the segments that the chunk completes,
merges the results of the branches by lse, passes the rows that no branch will change to the sink,
and drops them. The window never holds more than a chunk and the longest segment.

Where all branches complete the same rows at once (chunks that every segment length divides), a step
is one call of the whole pattern on the rows as they were read, without a copy.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch

from dilated_core.checks import check_bool, check_integer
from dilated_core.inputs import check_scale
from dilated_core.pattern.branches import DilatedPattern, clip_pattern
from dilated_core.streaming.journal import check_same_call, read_journal, write_journal
from dilated_core.streaming.window import BranchRunner, Reader, Source, stream_results

Sink = Callable[[int, int, torch.Tensor], object]


@runtime_checkable
class StatefulSink(Protocol):
    """A sink whose effects add up, such as a checksum: a journal keeps its state."""

    def __call__(self, start: int, stop: int, out: torch.Tensor, /) -> object:
        """Receive the results of a range."""
        ...

    def state_dict(self) -> Any:
        """The state after the ranges so far: numbers, strings, lists and dicts of them."""
        ...

    def load_state_dict(self, state: Any, /) -> object:
        """Continue from a state that `state_dict` returned."""
        ...


_CHUNK_BYTES = 2**23  # of q, k, v and out together; see default_chunk_length


def dilated_attention_streamed(
    source: Source,
    sink: Sink,
    pattern: DilatedPattern,
    *,
    seq_len: int,
    is_causal: bool = False,
    scale: float | None = None,
    backend: str = "auto",
    chunk_length: int | None = None,
    journal: str | os.PathLike[str] | None = None,
    progress: Callable[[int, int], object] | None = None,
) -> None:
    """`dilated_attention` of a sequence that need not fit in memory; without gradients.

    The result is the result for the whole sequence at once, for any pattern and length. Memory is
    that of a chunk and of the longest segment, whatever `seq_len` is.

    With a `journal` the call can be repeated after its process was killed, and continues after the
    last recorded range. Outputs are then bit for bit those of an undisturbed run. The range in
    flight at the kill may reach the sink twice, with the same rows. A sink whose effects add up
    has `state_dict()`, which returns JSON values, and `load_state_dict(state)`: the journal records
    the state of the sink together with the range.

    Args:
        source: `source(start, stop)` returns q `(B, stop − start, H, D)` and k, v
            `(B, stop − start, H_kv, D)` of these positions. The first call is `source(0, 1)`, for
            the shapes; then ranges follow in rising order. After a kill, ranges from up to the
            longest segment and a chunk before the recorded end are read again. The source may
            reuse its memory in the next call.
        sink: `sink(start, stop, out)` receives the results `(B, stop − start, H, D)` of these
            positions, in the dtype of q. Ranges come in order, each position once. `out` is only
            valid during the call: copy what must stay.
        pattern: The branches.
        seq_len: S, in positions.
        is_causal: Query i sees only keys j ≤ i.
        scale: Factor of the scores; 1/√D if None.
        backend: `"auto"`, or a name of `available_backends()`.
        chunk_length: Positions read at a time. Multiples of every segment length are fastest. A
            chunk shorter than the longest segment saves no memory and costs time. None: a length
            chosen from the shapes.
        journal: Path of the record of finished ranges, in a folder that exists. The file appears
            with the first range, and stays. One process at a time may use it.
        progress: `progress(done, total)` is called with positions after each range.

    Raises:
        TypeError: If an argument has the wrong type, or the source returns something other than
            three tensors of one floating dtype.
        ValueError: If a number is out of range, the rows of the source do not fit, require
            gradients or change in shape, dtype or device, or the journal is of another call,
            damaged, or cannot be read.

    Example:
        >>> q, k, v = torch.randn(3, 1, 1000, 2, 16).unbind()
        >>> pattern = DilatedPattern([64, 128], [1, 2])
        >>> out = torch.empty_like(q)
        >>> dilated_attention_streamed(
        ...     tensor_source(q, k, v), tensor_sink(out), pattern, seq_len=1000, chunk_length=256
        ... )
        >>> bool((out - dilated_attention(q, k, v, pattern)).abs().max() < 1e-6)
        True
    """
    seq_len = check_integer("seq_len", seq_len, at_least=1)
    check_bool("is_causal", is_causal)
    if chunk_length is not None:
        chunk_length = check_integer("chunk_length", chunk_length, at_least=1)
    if journal is not None and not isinstance(journal, (str, os.PathLike)):
        raise TypeError(f"journal is {journal!r}; it must be the path of a file.")
    path = None if journal is None else Path(journal)
    for name, function in (("source", source), ("sink", sink), ("progress", progress)):
        if not callable(function) and (name, function) != ("progress", None):
            raise TypeError(f"{name} is a {type(function).__name__}; it must be callable.")
    if hasattr(sink, "state_dict") != hasattr(sink, "load_state_dict"):
        raise TypeError(
            "the sink has only one of state_dict and load_state_dict; give it both, so that its "
            "state is recorded and restored, or none."
        )
    with torch.no_grad():
        reader = Reader(source, pattern)
        q, k = reader.q, reader.k
        scale = check_scale(scale, q.shape[-1])
        record = None if path is None else read_journal(path)
        if chunk_length is None:
            # The recorded one, because a later version may choose another default.
            bytes_per_row = 2 * (q.nbytes + k.nbytes)
            recorded: int | None = record["call"]["chunk_length"] if record else None
            chunk_length = recorded or default_chunk_length(pattern, seq_len, bytes_per_row)
        call = {
            "segment_lengths": list(pattern.segment_lengths),
            "dilation_rates": list(pattern.dilation_rates),
            "head_offsets": pattern.head_offsets,
            "padding": pattern.padding,
            "seq_len": seq_len,
            "is_causal": is_causal,
            "scale": scale,
            "backend": backend,
            "chunk_length": chunk_length,
            "batch_size": q.shape[0],
            "num_heads": q.shape[2],
            "num_kv_heads": k.shape[2],
            "head_dim": q.shape[3],
            "dtype": str(q.dtype),
            "device": q.device.type,
            "sink_has_state": isinstance(sink, StatefulSink),
        }
        done = 0
        if path is not None and record is not None:
            check_same_call(path, record["call"], call)
            done = record["done"]
            if isinstance(sink, StatefulSink):
                sink.load_state_dict(record["sink_state"])
            if progress is not None:
                progress(done, seq_len)
        clipped = clip_pattern(pattern, seq_len, q.shape[2])
        runner = BranchRunner(clipped, seq_len, is_causal, scale, backend)
        for start, stop, out in stream_results(reader, runner, chunk_length, done):
            sink(start, stop, out)
            if path is not None:
                state = sink.state_dict() if isinstance(sink, StatefulSink) else None
                write_journal(path, call, stop, state)
            if progress is not None:
                progress(stop, seq_len)


def default_chunk_length(pattern: DilatedPattern, seq_len: int, bytes_per_row: int) -> int:
    """Positions to read at a time: a few megabytes of rows, whole segments of every branch.

    Args:
        pattern: The branches.
        seq_len: S.
        bytes_per_row: Of q, k, v and out together, for one position.
    """
    lengths = [min(w, seq_len) for w in pattern.segment_lengths]
    least = max(_CHUNK_BYTES // max(1, bytes_per_row), *lengths)
    common = math.lcm(*lengths)
    # Where segments do not nest within a reasonable length, the longest still end with the chunk.
    unit = common if common <= 2 * least else max(lengths)
    return -(-least // unit) * unit
