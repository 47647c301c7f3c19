"""Attention over ranks: bytes, hops, memory and time of each exchange, on gloo processes.

Causal attention, forward and backward, on 1, 2 and 4 processes of one thread each. Contenders are
the exchanges with one pattern, and dense ring attention, which is a pattern of one branch with
w = S and r = 1. All contenders of a number of ranks run in turn in the same processes; memory comes
from processes of their own. Run `python benchmarks/ring.py`.

Communication that is hidden: a call is timed with its messages; with a transport that sends
nothing, so that only computation is left; and its messages alone, one step after another. Hidden is
what the first time is below the sum of the other two, as a share of the messages' time. It is
recorded only where the messages take longer than the times of calls are spread. Processes on one
machine send through memory and share its cores, so this says little about GPUs.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import dilated_ring.over_ranks
import torch
import torch.distributed as dist
from dilated_core import DilatedPattern, dilated_attention
from dilated_core.testing.processes import run_processes
from dilated_ring import exchange_plan, ring_dilated_attention, shard_sequence
from dilated_ring.transport import DistributedTransport
from harness import high_water_bytes, reset_high_water, write_result

RESULT = Path(__file__).parent / "results" / "ring.json"
SEQ_LEN, NUM_HEADS, HEAD_DIM, ROUNDS = 4096, 8, 64, 3
DILATED = ([256, 1024, 4096], [1, 4, 16])
DENSE = ([SEQ_LEN], [1])


class Contender(NamedTuple):
    """A pattern and how it is exchanged."""

    name: str
    branches: tuple[list[int], list[int]]
    exchange: str

    @property
    def pattern(self) -> DilatedPattern:
        """The branches as a pattern."""
        return DilatedPattern(*self.branches)


CONTENDERS = [
    Contender("ring", DILATED, "ring"),
    Contender("all_gather", DILATED, "all_gather"),
    Contender("all_to_all", DILATED, "all_to_all"),
    Contender("dense ring", DENSE, "ring"),
]
Messages = list[tuple[dict[int, torch.Tensor], dict[int, torch.Tensor], str]]


class RecordingTransport(DistributedTransport):
    """Keeps the messages of each step, to send them again."""

    messages: Messages = []  # noqa: RUF012  (of the process)

    def start(self, rank: int, sends: Any, receives: Any, *, step: str) -> Any:
        """Note the messages and send them."""
        self.messages.append((dict(sends), dict(receives), step))
        return super().start(rank, sends, receives, step=step)


class SilentTransport(DistributedTransport):
    """Sends nothing: what comes is zeros."""

    def start(self, rank: int, sends: Any, receives: Any, *, step: str) -> Any:
        """Fill what is to be received with zeros."""
        for tensor in receives.values():
            tensor.zero_()

        class Arrived:
            def wait(self) -> Any:
                return receives

        return Arrived()


def attend(contender: Contender, seq_len: int) -> torch.Tensor:
    """Forward and backward on this rank's shard of random inputs; returns out."""
    generator = torch.Generator().manual_seed(dist.get_rank())
    shape = (1, -(-seq_len // dist.get_world_size()), NUM_HEADS, HEAD_DIM)
    q, k, v, dout = (torch.randn(shape, generator=generator) for _ in range(4))
    q, k, v = (x.requires_grad_() for x in (q, k, v))
    out = ring_dilated_attention(
        q, k, v, contender.pattern, is_causal=True, exchange=contender.exchange, seq_len=seq_len
    )
    out.backward(dout)
    return out


def check_correctness(contender: Contender) -> None:
    """Compare a short call with one device; a wrong result is not timed."""
    torch.manual_seed(0)
    whole = torch.randn(4, 1, 1000, NUM_HEADS, HEAD_DIM).unbind()
    q, k, v = (x.requires_grad_() for x in whole[:3])
    expected = dilated_attention(q, k, v, contender.pattern, is_causal=True)
    grads = torch.autograd.grad(expected, (q, k, v), whole[3])
    q, k, v, dout = (shard_sequence(x.detach(), dim=1) for x in whole)
    q, k, v = (x.requires_grad_() for x in (q, k, v))
    out = ring_dilated_attention(
        q, k, v, contender.pattern, is_causal=True, exchange=contender.exchange
    )
    out.backward(dout)
    for x, y in zip((out, q.grad, k.grad, v.grad), (expected, *grads), strict=True):
        torch.testing.assert_close(x, shard_sequence(y.detach(), dim=1), rtol=1e-3, atol=1e-4)


def send_again(messages: Messages) -> None:
    """The messages of a call alone, each step after the last one."""
    transport = DistributedTransport()
    for sends, receives, step in messages:
        transport.start(dist.get_rank(), sends, receives, step=step).wait()


def timed(call: Callable[[], object]) -> float:
    """Seconds until the slowest rank has finished."""
    dist.barrier()
    start = time.perf_counter()
    call()
    dist.barrier()
    return time.perf_counter() - start


def time_in_turn(seq_len: int) -> dict[str, dict[str, list[float]]]:
    """Seconds of each contender with its messages, without them, and of the messages alone."""
    recorded: dict[str, Messages] = {}
    for contender in CONTENDERS:
        check_correctness(contender)
        RecordingTransport.messages = []
        dilated_ring.over_ranks.DistributedTransport = RecordingTransport
        attend(contender, seq_len)
        recorded[contender.name] = RecordingTransport.messages
    samples: dict[str, dict[str, list[float]]] = {
        contender.name: {"call": [], "computation": [], "messages": []} for contender in CONTENDERS
    }
    for _ in range(ROUNDS):
        for contender in CONTENDERS:
            into = samples[contender.name]
            for part, transport in (
                ("call", DistributedTransport),
                ("computation", SilentTransport),
            ):
                dilated_ring.over_ranks.DistributedTransport = transport
                into[part].append(timed(lambda contender=contender: attend(contender, seq_len)))
            messages = recorded[contender.name]
            into["messages"].append(timed(lambda messages=messages: send_again(messages)))
    return samples


def measure_peak(name: str, seq_len: int) -> int:
    """Peak of forward and backward above an idle process, inputs and results included."""
    (contender,) = (x for x in CONTENDERS if x.name == name)
    # Freed memory goes back at once, so that the peak is that of live memory.
    ctypes.CDLL(None).mallopt(-3, 65536)  # M_MMAP_THRESHOLD
    attend(contender, 512)
    reset_high_water()
    before = high_water_bytes()
    attend(contender, seq_len)
    return high_water_bytes() - before


def rows_of(size: int, seq_len: int) -> list[dict[str, Any]]:
    """A row for each contender on so many ranks."""
    load = round(os.getloadavg()[0], 2)
    samples: dict[str, dict[str, list[float]]] = run_processes(
        time_in_turn, size, seq_len, timeout_s=900
    )[0]
    rows: list[dict[str, Any]] = []
    for contender in CONTENDERS:
        plan = exchange_plan(
            contender.pattern, seq_len, size, exchange=contender.exchange, num_heads=NUM_HEADS,
            head_dim=HEAD_DIM, dtype=torch.float32, is_causal=True,
        )  # fmt: skip
        seconds = samples[contender.name]
        median = {part: statistics.median(values) for part, values in seconds.items()}
        low, _, high = statistics.quantiles(seconds["call"], n=4, method="inclusive")
        exposed = median["call"] - median["computation"]
        is_telling = plan.num_hops and median["messages"] > high - low
        rows.append(
            {
                "exchange": contender.name,
                "ranks": size,
                "seq_len": seq_len,
                "num_heads": NUM_HEADS,
                "head_dim": HEAD_DIM,
                "dtype": "float32",
                "segment_lengths": contender.branches[0],
                "dilation_rates": contender.branches[1],
                "most_bytes_of_a_rank": max(x.forward_bytes + x.backward_bytes for x in plan.ranks),
                "bytes": plan.forward_bytes + plan.backward_bytes,
                "hops": plan.num_hops,
                "peak_bytes": max(run_processes(measure_peak, size, contender.name, seq_len)),
                **{f"{part}_s": value for part, value in median.items()},
                "low_s": low,
                "high_s": high,
                "rounds": ROUNDS,
                "hidden": 1 - exposed / median["messages"] if is_telling else None,
                "load": load,
            }
        )
        print(rows[-1], flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ranks", type=int, nargs="*", default=[1, 2, 4])
    parser.add_argument("--seq-len", type=int, default=SEQ_LEN)
    parser.add_argument("--out", type=Path, default=RESULT)
    options = parser.parse_args()
    rows = [row for size in options.ranks for row in rows_of(size, options.seq_len)]
    write_result(options.out, "ring", rows)


if __name__ == "__main__":
    main()
