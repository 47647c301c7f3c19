"""Compile a sample of the kernels for GPUs that are not there; run by test_compile_ahead.py.

Prints its findings as JSON. A script, because Triton compiles only in a process that does not
interpret.
"""

import json
import re
import sys

import torch
from dilated_core import AttentionOptions
from dilated_core.backends.contract import BlockLists
from dilated_kernels.fused import decode
from dilated_kernels.fused.blocks import attention
from dilated_kernels.fused.tuning import Config, Tuning

from tools.compile_ahead import (
    attention_launches,
    compile_launch,
    resources,
    specialize,
    step_launches,
)

STEPS = [((9, 0), 64, torch.bfloat16, 1), ((8, 0), 128, torch.float32, 4)]


def kernel(dtype, kind, head_dim, capability, which, **options):
    """What a kernel uses, launched for a branch alone (0), the first of two (1) or the last (2)."""
    if "config" in options:
        options["configs"] = {kind: Config(*options.pop("config"))}
    arguments = (getattr(torch, dtype), head_dim, tuple(capability))
    return resources(attention_launches(*arguments, **options)[kind][which], tuple(capability))


def wide_loads(launch, capability):
    """Loads of 16 bytes in the code of a launch, and those that one tile takes per thread."""
    ptx = compile_launch(launch, capability).asm["ptx"]
    loads = re.findall(r"(?:ld\.global|cp\.async\.c)\S*", ptx)
    # Parts in float32, or keys and values.
    is_merging = launch.kernel is decode.merge_kernel
    row_bytes = 4 if is_merging else 2 * launch.arguments[0].itemsize
    sizes = launch.constants
    tile_bytes = sizes["BLOCK_S" if is_merging else "BLOCK_N"] * sizes["BLOCK_D"] * row_bytes
    return [
        sum("v4.b32" in load or "cp.async.cg" in load for load in loads),
        tile_bytes / (sizes["num_warps"] * 32 * 16),
    ]


def steps():
    """Resources and loads of decoding steps, and how many specialisations a long context has."""
    found = {"resources": [], "wide_loads": [], "specialisations": {}}
    for capability, head_dim, dtype, group in STEPS:
        for launch in step_launches(dtype, head_dim, group, [4095]):
            used = resources(launch, capability)
            found["resources"].append({"itemsize": dtype.itemsize, **used._asdict()})
            found["wide_loads"].append(wide_loads(launch, capability))
    # From 2³¹ − 1 on positions are divided in 64 bits.
    for launch in step_launches(torch.bfloat16, 64, 4, [2**33 + 4095]):
        compile_launch(launch, (9, 0))
    # Up to 23 parts, 1 and 16 among them, which Triton compiles apart where it may.
    positions = [*range(0, 300, 3), *range(1000, 4096, 32), 2**31 - 1, 2**31, 2**33, 2**40 + 1]
    for launch in step_launches(torch.bfloat16, 256, 1, positions):
        name = "decode" if launch.kernel is decode.decode_kernel else "merge"
        kinds = found["specialisations"].setdefault(name, [])
        kinds.append(repr(specialize(launch, (10, 0))[:3]))
    for name, kinds in found["specialisations"].items():
        found["specialisations"][name] = [len(kinds), len(set(kinds))]
    return found


def blocks():
    """Resources of the block-sparse kernels, and the specialisations of several lengths."""
    found = {"resources": [], "specialisations": []}
    for capability, dtype, head_dim in (((9, 0), torch.bfloat16, 64), ((8, 0), torch.float32, 128)):
        for launch in block_launches(1000, dtype, head_dim, capability):
            found["resources"].append(resources(launch, capability))
    kinds = set()
    for seq_len in (1, 16, 1000, 1024, 2**20):
        for launch in block_launches(seq_len, torch.bfloat16, 64, (9, 0)):
            kinds.add(launch.kernel.fn.__name__ + repr(specialize(launch, (9, 0))[:3]))
    found["specialisations"] = len(kinds)
    return found


def block_launches(seq_len, dtype, head_dim, capability):
    """Forward and backward over blocks of 64, of tensors without data."""
    q, k, v, dout = (
        torch.empty(1, seq_len, 4, head_dim, device="meta", dtype=dtype) for _ in "qkvd"
    )
    rows = torch.empty(1, seq_len, 4, device="meta")
    num_blocks = -(-seq_len // 64)
    offsets = torch.empty(4, num_blocks + 1, dtype=torch.int64, device="meta")
    entries = torch.empty(num_blocks, dtype=torch.int32, device="meta")
    lists = BlockLists(64, offsets, entries, offsets, entries)
    options, tuning = AttentionOptions(True, 0.1), Tuning(capability, "ieee")
    call = attention.Call(q, k, v, lists, options, tuning)
    yield attention.forward_launch(call, q, rows)
    yield from attention.backward_launches(call, dout, rows, rows, (q, k, v))


if __name__ == "__main__":
    kernels = [kernel(*row, **options) for *row, options in json.loads(sys.argv[1])]
    print(json.dumps({"kernels": kernels, "steps": steps(), "blocks": blocks()}))
