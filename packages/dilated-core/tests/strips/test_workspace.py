"""`max_workspace_bytes`: the same results within a limit, and memory that keeps it."""

import os
import subprocess
import sys

import pytest
import torch
from dilated_core import (
    DilatedPattern,
    dilated_attention,
    dilated_attention_with_lse,
    reference_dilated_attention_with_lse,
)
from dilated_core.backends.contract import AttentionInputs
from dilated_core.backends.registry import get_backend
from dilated_core.strips.plan import Span
from dilated_core.strips.workspace import Geometry, plan_pieces
from dilated_core.testing import Case, random_cases, relative_error
from hypothesis import example, given, settings
from hypothesis import strategies as st


def _smallest(q, pattern, k=None, **options):
    k = q if k is None else k
    try:
        dilated_attention(q, k, k, pattern, **options, max_workspace_bytes=1)
    except ValueError as error:
        return int(str(error).split()[-1].rstrip("."))
    return 1


@settings(max_examples=100, deadline=None)
@given(case=random_cases(with_options=True), share=st.floats(0, 1))
# Strips of the whole sequence that are cut by batch rows.
@example(case=Case(batch_size=3, seq_len=5, pattern=DilatedPattern([5, 5], [1, 1])), share=0.0)
def test_any_limit_gives_the_same(case, share):
    q, k, v, dout = case.tensors(dtype=torch.float64)
    smallest = _smallest(q, case.pattern, k, **case.options())
    limit = int(smallest + share * 20 * smallest)
    exact, exact_lse = reference_dilated_attention_with_lse(q, k, v, case.pattern, **case.options())
    out, lse = dilated_attention_with_lse(
        q, k, v, case.pattern, **case.options(), max_workspace_bytes=limit
    )
    assert relative_error(out, exact) < 1e-10
    finite = exact_lse > -torch.inf
    assert relative_error(lse[finite], exact_lse[finite]) < 1e-10
    dlse = torch.randn_like(lse)
    got = torch.autograd.grad((out, lse[finite]), (q, k, v), (dout, dlse[finite]))
    want = torch.autograd.grad((exact, exact_lse[finite]), (q, k, v), (dout, dlse[finite]))
    assert all(relative_error(a, e) < 1e-10 for a, e in zip(got, want, strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_in_pieces_is_rounded_once(dtype):
    q, k, v = torch.randn(3, 2, 100, 8, 16).to(dtype).unbind()
    pattern = DilatedPattern([8, 40, 80], [1, 2, 4])
    whole = dilated_attention(q, k, v, pattern)
    for limit in (30_000, 100_000):
        again = dilated_attention(q, k, v, pattern, max_workspace_bytes=limit)
        assert relative_error(again, whole) < torch.finfo(dtype).eps / 2


def _pieces(pattern, shape, num_kv_heads, dtype, limit, backend=None):
    B, S, H, D = shape
    inputs = AttentionInputs(
        torch.device("cpu"), dtype, H, D,
        num_kv_heads=num_kv_heads, seq_len=S, max_workspace_bytes=limit,
    )  # fmt: skip
    return plan_pieces(Geometry(pattern, inputs, B, Span(0, S), (0, H), False, True, backend, 2))


@pytest.mark.parametrize("head_offsets", ["interleaved", "blocked"])
@pytest.mark.parametrize("batch_size", [1, 3])
def test_pieces_of_positions_are_as_exact(batch_size, head_offsets):
    """Half precision is cut between segments, too; the last piece is shorter than a segment."""
    pattern = DilatedPattern([8, 16], [1, 3], padding="attended", head_offsets=head_offsets)
    q, k, v = torch.randn(3, batch_size, 77, 4, 16).bfloat16().unbind()
    mask = torch.rand(batch_size, 77) < 0.3
    shape = (batch_size, 77, 4, 16)
    limit = _smallest(q, pattern)
    pieces = _pieces(pattern, shape, 4, q.dtype, limit, get_backend("sdpa"))
    assert max(piece.positions.stop - piece.positions.start for piece in pieces) < 77
    for options in ({}, {"is_causal": True}, {"key_padding_mask": mask}):
        limit = _smallest(q, pattern, **options)
        whole = dilated_attention_with_lse(q, k, v, pattern, **options)
        again = dilated_attention_with_lse(q, k, v, pattern, **options, max_workspace_bytes=limit)
        assert relative_error(again.out, whole.out) < torch.finfo(q.dtype).eps / 2
        torch.testing.assert_close(again.lse, whole.lse)


def test_pieces_cover_every_row_once():
    pattern = DilatedPattern([8, 16, 32], [1, 2, 4])
    for dtype in (torch.float32, torch.bfloat16):
        for limit in (4_000, 6_000, 20_000, None):
            shape = (3, 100, 6, 8)
            pieces = _pieces(pattern, shape, 3, dtype, limit)
            visits = torch.zeros(shape[:3])
            for piece in pieces:
                piece.rows(visits).add_(1)
            assert (visits == 1).all()
    assert len(pieces) == 1


@pytest.mark.parametrize(
    ("limit", "error", "message"),
    [
        (0, ValueError, "max_workspace_bytes is 0; it must be at least 1"),
        (True, TypeError, "max_workspace_bytes is True; it must be an integer"),
        (1e6, TypeError, "max_workspace_bytes is 1000000.0; it must be an integer"),
        (100, ValueError, "max_workspace_bytes is 100; these inputs need at least [0-9]+"),
    ],
)
def test_mistakes(limit, error, message):
    x = torch.zeros(1, 64, 4, 8)
    with pytest.raises(error, match=message):
        dilated_attention(x, x, x, DilatedPattern([8, 32], [1, 2]), max_workspace_bytes=limit)


_MILLION = """
import sys, torch
from pathlib import Path
from dilated_core import DilatedPattern, dilated_attention

def high_water():
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) * 1024

dtype, limit = getattr(torch, sys.argv[1]), int(sys.argv[2])
pattern = DilatedPattern([64, 256, 1024], [1, 4, 16])
tiny = torch.zeros(1, 2048, 4, 16, dtype=dtype)
q = torch.zeros(1, 2**20, 4, 16, dtype=dtype)
with torch.no_grad():
    dilated_attention(tiny, tiny, tiny, pattern)  # loads kernels, starts threads
    Path("/proc/self/clear_refs").write_text("5")
    before = high_water()
    out, lse = dilated_attention(q, q, q, pattern, max_workspace_bytes=limit), 2**22 * 4
    print(high_water() - before - out.nbytes - lse)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads peak memory from /proc")
@pytest.mark.parametrize(("dtype", "limit"), [("float32", 16 * 2**20), ("bfloat16", 16 * 2**20)])
def test_a_million_tokens_stay_within_the_limit(dtype, limit):
    run = subprocess.run(
        [sys.executable, "-c", _MILLION, dtype, str(limit)],
        capture_output=True,
        text=True,
        check=False,
        # Freed memory goes back at once, so that the peak is that of live memory.
        env={**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"},
    )
    assert run.returncode == 0, run.stderr
    # Threads and the allocator itself come on top: a fixed amount.
    assert int(run.stdout) < limit + 8 * 2**20
