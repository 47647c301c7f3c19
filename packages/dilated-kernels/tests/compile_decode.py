"""Compile the decode kernels for GPUs that are not there; run by test_decode_compiled.py.

Prints as JSON what each specialisation uses of a GPU, and how many specialisations the steps of a
long context need. A script, because Triton compiles only in a process that does not interpret.
"""

import json
import re

import torch
import triton
from dilated_core import DecodingCache, DilatedPattern
from dilated_kernels.fused import decode, decode_launch
from dilated_kernels.fused.ahead_of_time import resource_usage
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import create_function_from_signature

PATTERN = DilatedPattern([256, 512, 1024, 2048, 4096], [1, 2, 4, 6, 12])


class Recorder:
    """Takes a kernel's place and keeps what it is launched with."""

    def __init__(self):
        self.calls = []

    def __getitem__(self, grid):
        return lambda *args, **kwargs: self.calls.append((args, kwargs))


def record(head_dim, dtype, group, positions):
    """Arguments of the launches at these positions, by kernel, as `decode_forward` makes them."""
    H, H_kv = 4 * group, 4
    sizes = {"batch_size": 2, "num_heads": H, "num_kv_heads": H_kv, "head_dim": head_dim}
    cache = DecodingCache(PATTERN, **sizes, dtype=dtype)
    q, k, v = (torch.zeros(2, 1, heads, head_dim, dtype=dtype) for heads in (H, H_kv, H_kv))
    recorders = {"decode_kernel": Recorder(), "merge_kernel": Recorder()}
    for name, recorder in recorders.items():
        setattr(decode_launch, name, recorder)
    for position in positions:
        decode_launch.decode_forward(
            *(q, k, v, cache.keys, cache.values, cache._layout), position=position, scale=0.1
        )
    return {name: recorder.calls for name, recorder in recorders.items()}


def specialise(kernel, target, args, kwargs):
    """Signature, constants, attributes and options that Triton derives from a launch."""
    backend = make_backend(target)
    bind = create_function_from_signature(kernel.signature, kernel.params, backend)
    bound, specialization, options = bind(*args, **kwargs)
    signature, constants, attributes = {}, {}, {}
    for i, (name, (kind, detail)) in enumerate(zip(bound, specialization, strict=True)):
        signature[name] = kind
        if kind == "constexpr":
            constants[i,] = bound[name]
        elif detail:
            attributes[i,] = backend.parse_attr(detail)
    return signature, constants, attributes, options


def resources(kernel, target, args, kwargs):
    """Registers, bytes of stack (spilled registers) and of shared memory of one launch.

    And the loads of 16 bytes in its code, beside those that one tile takes per thread.
    """
    signature, constants, attributes, options = specialise(kernel, target, args, kwargs)
    source = ASTSource(kernel, signature, constants, attributes)
    compiled = triton.compile(source, target=target, options=options)
    registers, stack = resource_usage(compiled.asm["cubin"])
    loads = re.findall(r"(?:ld\.global|cp\.async\.c)\S*", compiled.asm["ptx"])
    # Parts in float32, or keys and values.
    row_bytes = 4 if kernel is decode.merge_kernel else 2 * args[0].itemsize
    tile_bytes = kwargs.get("BLOCK_S", kwargs.get("BLOCK_N")) * kwargs["BLOCK_D"] * row_bytes
    return {
        "registers": registers,
        "stack": stack,
        "shared": compiled.metadata.shared,
        "wide_loads_of_a_tile": tile_bytes / (kwargs["num_warps"] * 32 * 16),
        "wide_loads": sum("v4.b32" in load or "cp.async.cg" in load for load in loads),
    }


def main():
    """Print the findings."""
    found = {"resources": [], "specialisations": {}}
    for capability, head_dim, dtype, group in [
        (90, 64, torch.bfloat16, 1),
        (90, 64, torch.bfloat16, 4),
        (90, 128, torch.float32, 4),
        (80, 96, torch.float16, 1),
        (80, 256, torch.float32, 4),
        (100, 128, torch.bfloat16, 4),
    ]:
        target = GPUTarget("cuda", capability, 32)
        calls = record(head_dim, dtype, group, [4095])
        for name, ((args, kwargs),) in calls.items():
            row = resources(getattr(decode, name), target, args, kwargs)
            row |= {"kernel": name, "capability": capability, "head_dim": head_dim}
            found["resources"].append(row | {"dtype": str(dtype), "group": group})
    # Up to 23 parts, 1 and 16 among them, which Triton compiles apart where it may.
    positions = [*range(300), *range(1000, 4096, 16), 2**31 - 1, 2**31, 2**33, 2**40 + 1]
    for name, calls in record(256, torch.bfloat16, 1, positions).items():
        kinds = {repr(specialise(getattr(decode, name), target, *call)[:3]) for call in calls}
        found["specialisations"][name] = [len(calls), len(kinds)]
    print(json.dumps(found))


if __name__ == "__main__":
    main()
