"""Memory that forward takes within `max_workspace_bytes`, measured in a process of its own."""

import json
import os
import subprocess
import sys

import pytest
import torch
from dilated_core import (
    DilatedPattern,
    dilated_attention,
    register_backend,
    unregister_backend,
)
from dilated_core.backends.eager import EagerBackend

# Threads, the plan and the allocator itself come on top of any limit.
ALLOWANCE = 2 * 2**20

_MEASURE = """
import json, sys, torch
from pathlib import Path
from dilated_core import DilatedPattern, dilated_attention

def status(field):
    text = Path("/proc/self/status").read_text()
    return int(text.split(field + ":")[1].split()[0]) * 1024

def measure(dtype, lengths, rates, kv_heads=4, masked=False, packed=False, padding="masked",
            limits=(), **options):
    dtype, S = getattr(torch, dtype), 4096
    pattern = DilatedPattern(lengths, rates, padding=padding)
    rows = (S,) if packed else (1, S)
    q, k, v = (torch.zeros(*rows, heads, 32, dtype=dtype) for heads in (4, kv_heads, kv_heads))
    if masked:
        options["key_padding_mask"] = torch.arange(S)[None] % 3 == 0
    if packed:
        options["cu_seqlens"] = torch.tensor([*range(0, S, 97), 3000, 3500, S]).sort()[0]
    attend = lambda limit: dilated_attention(q, k, v, pattern, max_workspace_bytes=limit, **options)
    attend(2**40)  # loads kernels, starts threads
    try:
        attend(1)
    except ValueError as error:
        smallest = int(str(error).split()[-1].rstrip("."))
    for limit in (smallest, int(1.3 * smallest), 3 * smallest, *limits):
        assert limit >= smallest, (limit, smallest)
        Path("/proc/self/clear_refs").write_text("5")
        before = status("VmRSS")
        out = attend(limit)
        lse = out.numel() // 32 * max(4, dtype.itemsize)
        yield limit, status("VmHWM") - before - out.nbytes - lse
        del out

with torch.no_grad():
    for call in json.loads(sys.argv[1]):
        print(json.dumps([[call, *pair] for pair in measure(**call)]))
"""

DENSE, WIDE, SHORT = ([4096], [1]), ([512, 4096], [1, 4]), ([64, 256], [1, 4])


def _call(backend, dtype, branches, **options):
    lengths, rates = branches
    call = {"backend": backend, "dtype": dtype, "lengths": lengths, "rates": rates}
    return {**call, **options}


CALLS = {
    "eager": [
        _call("eager", "float32", DENSE, limits=[2**23]),
        _call("eager", "float32", WIDE, masked=True, is_causal=True),
        _call("eager", "float32", WIDE, kv_heads=1, padding="attended"),
        _call("eager", "float64", WIDE, scale=-0.5, masked=True),
        _call("eager", "bfloat16", WIDE),
        _call("eager", "float32", SHORT, packed=True),
        _call("eager", "float32", WIDE, dropout_p=0.2),
    ],
    "sdpa": [
        _call("sdpa", "bfloat16", SHORT, limits=[2**20, 2**21]),
        _call("sdpa", "bfloat16", WIDE, masked=True, scale=-0.5),
        _call("sdpa", "bfloat16", WIDE, kv_heads=1, padding="attended"),
        _call("sdpa", "float32", WIDE, masked=True, is_causal=True),
        _call("sdpa", "float64", WIDE, masked=True, kv_heads=2),
        _call("sdpa", "float32", DENSE, scale=-0.5),
        _call("sdpa", "bfloat16", SHORT, packed=True),
    ],
}


@pytest.mark.skipif(sys.platform != "linux", reason="reads peak memory from /proc")
@pytest.mark.parametrize("backend", CALLS)
def test_no_call_takes_more_than_its_limit(backend):
    run = subprocess.run(
        [sys.executable, "-c", _MEASURE, json.dumps(CALLS[backend])],
        capture_output=True,
        text=True,
        check=False,
        # Freed memory goes back at once, so that the peak is that of live memory.
        env={**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"},
    )
    assert run.returncode == 0, run.stderr
    measured = [entry for line in run.stdout.splitlines() for entry in json.loads(line)]
    beyond = [(call, limit, used) for call, limit, used in measured if used > limit + ALLOWANCE]
    assert beyond == []
    # The limits are near what is used: the counts are no wild overestimates.
    assert any(used > limit / 2 for _, limit, used in measured)


def test_a_backend_that_does_not_count_is_refused():
    class Plain:
        """Only what the contract requires."""

        name, priority, contract = "plain", -1, EagerBackend.contract
        why_not = EagerBackend.why_not
        forward, backward = EagerBackend.forward, EagerBackend.backward

    register_backend(Plain())
    try:
        x = torch.zeros(1, 8, 2, 4)
        pattern = DilatedPattern([4], [1])
        dilated_attention(x, x, x, pattern, backend="plain")
        with pytest.raises(
            ValueError,
            match=r"backend 'plain' cannot run .*max_workspace_bytes is 1000000; it does not rep"
            "ort how much memory it allocates",
        ):
            dilated_attention(x, x, x, pattern, backend="plain", max_workspace_bytes=10**6)
        # "auto" takes one that counts.
        dilated_attention(x, x, x, pattern, max_workspace_bytes=10**6)
    finally:
        unregister_backend("plain")
