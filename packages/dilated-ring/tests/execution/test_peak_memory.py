"""Memory of a rank falls with the number of ranks, measured in processes of their own."""

import ctypes
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from dilated_core import DilatedPattern
from dilated_core.testing.processes import run_processes
from dilated_ring import ring_dilated_attention
from dilated_ring.layout import num_positions, spans_of_ranks

SEQ_LEN, NUM_HEADS, HEAD_DIM = 16384, 8, 64
PATTERN = DilatedPattern([256, 2048, SEQ_LEN], [1, 8, 64])


def status(field: str) -> int:
    text = Path("/proc/self/status").read_text()
    return int(text.split(field + ":")[1].split()[0]) * 1024


def attend(seq_len: int, layout: str, exchange: str) -> None:
    held = spans_of_ranks(layout, seq_len, dist.get_world_size())[dist.get_rank()]
    shape = (1, num_positions(held), NUM_HEADS, HEAD_DIM)
    q, k, v = (torch.ones(shape).requires_grad_() for _ in range(3))
    out = ring_dilated_attention(
        q, k, v, PATTERN, layout=layout, exchange=exchange, is_causal=True, seq_len=seq_len
    )
    out.backward(torch.ones_like(out))


def measure(layout: str, exchange: str) -> int:
    """Peak of forward and backward, with their inputs and results, in bytes."""
    # Freed memory goes back at once, so that the peak is that of live memory.
    ctypes.CDLL(None).mallopt(-3, 65536)  # M_MMAP_THRESHOLD
    attend(512, layout, exchange)  # loads kernels, starts threads and connections
    Path("/proc/self/clear_refs").write_text("5")
    before = status("VmRSS")
    attend(SEQ_LEN, layout, exchange)
    return status("VmHWM") - before


@pytest.mark.skipif(sys.platform != "linux", reason="reads peak memory from /proc")
def test_peak_of_a_rank():
    (alone,) = run_processes(measure, 1, "contiguous", "ring")
    sizes = {}
    for size, limit, layout, exchange in (
        (2, 0.53, "contiguous", "ring"),
        (2, 0.53, "zigzag", "all_gather"),
        (4, 0.27, "contiguous", "ring"),
        (4, 0.27, "zigzag", "auto"),
    ):
        peaks = run_processes(measure, size, layout, exchange)
        sizes[size, layout, exchange] = max(peaks) / alone, limit
    beyond = {key: value for key, value in sizes.items() if value[0] > value[1]}
    assert not beyond, sizes
