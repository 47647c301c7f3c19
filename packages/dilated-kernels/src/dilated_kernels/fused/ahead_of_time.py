"""Compile the kernels for a GPU that is not there, and read what they use of it.

Registers, spills and shared memory decide whether a configuration is any good, and the compiler
tells them without a GPU. Needs Triton's own compiler, hence not its interpreter.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from dilated_kernels.fused import backward, forward
from dilated_kernels.fused.configs import Config, Kind, block_d, tabled_config

KERNELS: dict[Kind, Any] = {
    "forward": cast(Any, forward.forward_kernel),
    "dq": cast(Any, backward.dq_kernel),
    "dk_dv": cast(Any, backward.dk_dv_kernel),
}

_TYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}

# Pointers to results and to what is accumulated are always float32.
_FLOAT32_POINTERS = ("partial", "dk_partial", "dv_partial", "lse", "delta")
_DATA_POINTERS = ("q", "k", "v", "out", "dout", "dq", "dk", "dv")
_OPTIONAL_POINTERS = {"key_mask": "*u8", "segments": "*i64", "order": "*i32"}
_FLOATS = ("scale", "dropout_p")


class Resources(NamedTuple):
    """What a compiled kernel uses.

    Attributes:
        registers: Per thread; a GPU has at most 255.
        spilled_bytes: Of local memory per thread, where registers did not suffice.
        shared_bytes: Of shared memory per program.
    """

    registers: int
    spilled_bytes: int
    shared_bytes: int


def compile_kernel(
    kind: Kind,
    dtype: torch.dtype,
    head_dim: int,
    capability: tuple[int, int],
    *,
    is_causal: bool,
    precision: str = "ieee",
    dropout: bool = False,
    with_options: bool = False,
    config: Config | None = None,
) -> Resources:
    """Compile one specialisation of a kernel and read its resources.

    Rates, grouped queries, lengths and head counts are arguments of the kernel, so one
    specialisation serves them all.

    Args:
        kind: Which kernel.
        dtype: Of q, k and v.
        head_dim: D.
        capability: Compute capability, such as (9, 0).
        is_causal: As in the call.
        precision: Of float32 products: "ieee" or "tf32".
        dropout: With dropout.
        with_options: With a key padding mask, packed documents and a tile order.
        config: Tiles, warps and stages; what `choose_config` takes if None.

    Raises:
        RuntimeError: If Triton runs as an interpreter, or has no disassembler to ask.
    """
    kernel: Any = KERNELS[kind]
    if not hasattr(kernel, "cache_key"):
        raise RuntimeError("Triton runs as an interpreter; unset TRITON_INTERPRET to compile.")
    config = config or tabled_config(kind, dtype, head_dim, capability, precision)
    constants: dict[str, Any] = {
        "HEAD_DIM": head_dim,
        "BLOCK_D": block_d(head_dim),
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "IS_CAUSAL": is_causal,
        "BLOCKED": False,
        "ATTENDED": False,
        "HAS_DROPOUT": dropout,
        "PRECISION": precision if dtype == torch.float32 else "tf32",
    }
    signature: dict[str, str] = {}
    attributes: dict[tuple[int, ...], list[list[Any]]] = {}
    values: dict[str, Any] = {}
    divisible = [["tt.divisibility", 16]]
    for i, name in enumerate(kernel.arg_names):
        if name in constants or (name in _OPTIONAL_POINTERS and not with_options):
            signature[name] = "constexpr"
            values[name] = constants.get(name)
        elif name in _FLOAT32_POINTERS:
            signature[name], attributes[i,] = "*fp32", divisible
        elif name in _DATA_POINTERS:
            signature[name], attributes[i,] = f"*{_TYPES[dtype]}", divisible
        elif name in _OPTIONAL_POINTERS:
            signature[name], attributes[i,] = _OPTIONAL_POINTERS[name], divisible
        elif name in _FLOATS:
            signature[name] = "fp32"
        else:
            signature[name] = "i32"
            if "_stride_" in name and not name.startswith("mask"):
                attributes[i,] = divisible
    target = GPUTarget("cuda", capability[0] * 10 + capability[1], 32)
    compiled = cast(Any, triton.compile)(
        cast(Any, ASTSource)(kernel, signature, values, attributes),
        target=target,
        options={
            "num_warps": config.num_warps,
            "num_stages": config.num_stages,
            "enable_fp_fusion": True,
        },
    )
    registers, stack = resource_usage(compiled.asm["cubin"])
    return Resources(registers, stack, compiled.metadata.shared)


def resource_usage(cubin: bytes) -> tuple[int, int]:
    """Registers and bytes of stack, which is where spilled registers go."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    if not tool.exists():
        raise RuntimeError(f"this Triton has no {tool.name}, so resources cannot be read.")
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "kernel.cubin")
        file.write_bytes(cubin)
        text = subprocess.run(
            [tool, "--dump-resource-usage", file], check=True, capture_output=True, text=True
        ).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", text)
    if found is None:
        raise RuntimeError(f"cuobjdump says nothing about registers: {text!r}")
    return int(found[1]), int(found[2])
