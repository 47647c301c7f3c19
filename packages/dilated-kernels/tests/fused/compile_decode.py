"""Compile the decode kernels for GPUs that are not there; run by test_decode_compiled.py.

Prints as JSON how keys are loaded, what a sample of specialisations uses, and how many of them the
steps of a long context need. A script, because Triton compiles only in a process that does not
interpret.
"""

import json
import re

import torch
from dilated_kernels.fused import decode, decode_launch
from dilated_kernels.fused.ahead_of_time import (
    compile_decode,
    compile_launch,
    decode_launches,
    specialize,
)

SAMPLE = [
    ((9, 0), 64, torch.bfloat16, 1),
    ((9, 0), 64, torch.bfloat16, 4),
    ((9, 0), 128, torch.float32, 4),
    ((8, 0), 96, torch.float16, 1),
    ((8, 0), 256, torch.float32, 4),
    ((10, 0), 128, torch.bfloat16, 4),
]


def wide_loads(kernel, capability, call):
    """Loads of 16 bytes in the code of a launch, and those that one tile takes per thread."""
    arguments, keywords = call
    loads = re.findall(
        r"(?:ld\.global|cp\.async\.c)\S*", compile_launch(kernel, capability, call).asm["ptx"]
    )
    # Parts in float32, or keys and values.
    row_bytes = 4 if kernel is decode.merge_kernel else 2 * arguments[0].itemsize
    rows = keywords.get("BLOCK_S", keywords.get("BLOCK_N"))
    tile_bytes = rows * keywords["BLOCK_D"] * row_bytes
    return [
        sum("v4.b32" in load or "cp.async.cg" in load for load in loads),
        tile_bytes / (keywords["num_warps"] * 32 * 16),
    ]


def main():
    """Print the findings."""
    found = {"resources": [], "wide_loads": [], "specialisations": {}}
    for capability, head_dim, dtype, group in SAMPLE:
        compiled = compile_decode(dtype, head_dim, capability, group=group)
        for name, resources in compiled.items():
            found["resources"].append({"kernel": name, "dtype": str(dtype), **resources._asdict()})
        for name, (call,) in decode_launches(dtype, head_dim, group, [4095]).items():
            found["wide_loads"].append(wide_loads(getattr(decode, name), capability, call))
    # From 2³¹ − 1 on positions are divided in 64 bits.
    for name, (call,) in decode_launches(torch.bfloat16, 64, 4, [2**33 + 4095]).items():
        compile_launch(getattr(decode, name), (9, 0), call)
    # Up to 23 parts, 1 and 16 among them, which Triton compiles apart where it may.
    positions = [*range(300), *range(1000, 4096, 16), 2**31 - 1, 2**31, 2**33, 2**40 + 1]
    for name, calls in decode_launches(torch.bfloat16, 256, 1, positions).items():
        kernel = getattr(decode_launch, name)
        kinds = {repr(specialize(kernel, (10, 0), call)[:3]) for call in calls}
        found["specialisations"][name] = [len(calls), len(kinds)]
    print(json.dumps(found))


if __name__ == "__main__":
    main()
