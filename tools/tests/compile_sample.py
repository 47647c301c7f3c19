"""Compile a sample of the kernels for GPUs that are not there; run by test_compile_ahead.py.

Prints its findings as JSON. A script, because Triton compiles only in a process that does not
interpret.
"""

import json
import re
import sys

import torch
from dilated_kernels.fused import decode
from dilated_kernels.fused.tuning import Config

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


if __name__ == "__main__":
    kernels = [kernel(*row, **options) for *row, options in json.loads(sys.argv[1])]
    print(json.dumps({"kernels": kernels, "steps": steps()}))
