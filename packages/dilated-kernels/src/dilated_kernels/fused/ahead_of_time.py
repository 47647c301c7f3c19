"""Compile the kernels for a GPU that is not there, and read what they use of it.

Registers, spills and shared memory decide whether a configuration is any good, and the compiler
tells them without a GPU. Needs Triton's own compiler, hence not its interpreter.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
import triton
from dilated_core import DilatedPattern
from dilated_core.cache_rows import index_blocks
from dilated_core.decoding_plan import plan_blocks
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia import compiler as nvidia_compiler
from triton.compiler import ASTSource, make_backend
from triton.runtime import jit

from dilated_kernels.fused import backward, decode_launch, forward
from dilated_kernels.fused.configs import Config, Kind, block_d, tabled_config

KERNELS: dict[Kind, Any] = {
    "forward": cast(Any, forward.forward_kernel),
    "dq": cast(Any, backward.dq_kernel),
    "dk_dv": cast(Any, backward.dk_dv_kernel),
}

_TYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}

# Pointers to results and to what is accumulated are always float32.
_FLOAT32_POINTERS = ("partial", "dk_partial", "dv_partial", "lse", "lse_log2", "delta")
_DATA_POINTERS = ("q", "k", "v", "out", "dout", "dq", "dk", "dv")
_OPTIONAL_POINTERS = {"key_mask": "*u8", "segments": "*i64", "order": "*i32"}
_FLOATS = ("scale", "dropout_p")


class Resources(NamedTuple):
    """What a compiled kernel uses.

    Attributes:
        registers: Per thread; a GPU has at most 255.
        spilled_bytes: Of local memory per thread, where registers did not suffice.
        spills_in_loops: Instructions in loops that read or write them. A value that is put aside
            before a loop and fetched after it costs nothing; these would.
        shared_bytes: Of shared memory per program.
        tensor_columns: Of tensor memory per program, which only 10.x has. Where there are too few,
            what Triton compiles is a trap.
        is_serialized: Whether each product of warp groups waits for the last, which the compiler
            for 9.0 resorts to where it cannot follow the accumulators.
    """

    registers: int
    spilled_bytes: int
    spills_in_loops: int
    shared_bytes: int
    tensor_columns: int
    is_serialized: bool


def compile_kernel(
    kind: Kind,
    dtype: torch.dtype,
    head_dim: int,
    capability: tuple[int, int],
    *,
    is_causal: bool,
    precision: str = "ieee",
    dropout: bool = False,
    options: Collection[str] = (),
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
        options: With which of "key_mask", "segments" (packed documents) and "order" (of tiles).
        config: Tiles, warps and stages; what `choose_config` takes if None.

    Raises:
        RuntimeError: If Triton runs as an interpreter, or has no disassembler to ask.
    """
    kernel: Any = KERNELS[kind]
    _check_compiler(kernel)
    if config is None:
        extras = dropout or "key_mask" in options
        config = tabled_config(kind, dtype, head_dim, capability, precision, extras)
    constants: dict[str, Any] = {
        "HEAD_DIM": head_dim,
        "BLOCK_D": block_d(head_dim),
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "IS_CAUSAL": is_causal,
        "BLOCKED": False,
        "ATTENDED": False,
        "POSITIVE_SCALE": True,
        "HAS_DROPOUT": dropout,
        "WIDE": False,
        "PRECISION": precision if dtype == torch.float32 else "tf32",
    }
    signature: dict[str, str] = {}
    attributes: dict[tuple[int, ...], list[list[Any]]] = {}
    values: dict[str, Any] = {}
    divisible = [["tt.divisibility", 16]]
    for i, name in enumerate(kernel.arg_names):
        if name in constants or (name in _OPTIONAL_POINTERS and name not in options):
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
    source = cast(Any, ASTSource)(kernel, signature, values, attributes)
    launch_options = {
        "num_warps": config.num_warps,
        "num_stages": config.num_stages,
        "enable_fp_fusion": True,
    }
    target = _target(capability)
    return _resources(cast(Any, triton.compile)(source, target=target, options=launch_options))


Call = tuple[tuple[Any, ...], dict[str, Any]]
"""Arguments and keywords of a launch."""


def decode_launches(
    dtype: torch.dtype, head_dim: int, group: int, positions: Iterable[int]
) -> dict[str, list[Call]]:
    """What the decode kernels would be launched with at these positions of a long context.

    Args:
        dtype: Of q, k, v and the cache.
        head_dim: D.
        group: Heads of q per head of k and v.
        positions: Of the newest token.

    Returns:
        By the kernel's name in `decode_launch`.
    """
    pattern = DilatedPattern([256, 512, 1024, 2048, 4096], [1, 2, 4, 6, 12])
    H, H_kv = 4 * group, 4
    blocks, num_rows = plan_blocks(pattern, H, H_kv, None)
    layout = index_blocks(pattern, blocks, H, None, torch.device("cpu"))
    q = torch.zeros(2, 1, H, head_dim, dtype=dtype)
    k = v = torch.zeros(2, 1, H_kv, head_dim, dtype=dtype)
    keys = values = torch.zeros(2, num_rows, head_dim, dtype=dtype)
    recorders = {"decode_kernel": _Recorder(), "merge_kernel": _Recorder()}
    kernels = {name: getattr(decode_launch, name) for name in recorders}
    try:
        for name, recorder in recorders.items():
            setattr(decode_launch, name, recorder)
        for position in positions:
            decode_launch.decode_forward(
                *(q, k, v, keys, values, layout), position=position, scale=0.1
            )
    finally:
        for name, kernel in kernels.items():
            setattr(decode_launch, name, kernel)
    return {name: recorder.calls for name, recorder in recorders.items()}


class _Recorder:
    """Takes a kernel's place and keeps what it is launched with."""

    def __init__(self) -> None:
        self.calls: list[Call] = []

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def record(*arguments: Any, **keywords: Any) -> None:
            self.calls.append((arguments, keywords))

        return record


def specialize(kernel: Any, capability: tuple[int, int], call: Call) -> tuple[Any, ...]:
    """Signature, constants, attributes and options that Triton derives from a launch."""
    backend: Any = make_backend(_target(capability))
    make_bind = cast(Any, jit).create_function_from_signature
    bind: Any = make_bind(kernel.signature, kernel.params, backend)
    bound, specialization, options = bind(*call[0], **call[1])
    signature: dict[str, Any] = {}
    constants: dict[tuple[int, ...], Any] = {}
    attributes: dict[tuple[int, ...], Any] = {}
    for i, (name, (kind, detail)) in enumerate(zip(bound, specialization, strict=True)):
        signature[name] = kind
        if kind == "constexpr":
            constants[i,] = bound[name]
        elif detail:
            attributes[i,] = backend.parse_attr(detail)
    return signature, constants, attributes, options


def compile_launch(kernel: Any, capability: tuple[int, int], call: Call) -> Any:
    """The compiled kernel of a launch, as Triton gives it."""
    *arguments, options = specialize(kernel, capability, call)
    source = cast(Any, ASTSource)(kernel, *arguments)
    return cast(Any, triton.compile)(source, target=_target(capability), options=options)


def compile_decode(
    dtype: torch.dtype,
    head_dim: int,
    capability: tuple[int, int],
    *,
    group: int,
    precision: str = "ieee",
) -> dict[str, Resources]:
    """Compile the two decode kernels, "decode" and "merge", as a step of a long context needs them.

    Args:
        dtype, head_dim, capability, precision: As for `compile_kernel`.
        group: Heads of q per head of k and v; all above 1 make one specialisation.

    Raises:
        RuntimeError: As `compile_kernel`.
    """
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")
    try:
        launches = decode_launches(dtype, head_dim, group, [4095])
    finally:
        torch.set_float32_matmul_precision(before)
    found: dict[str, Resources] = {}
    for name, (call,) in launches.items():
        kernel = getattr(decode_launch, name)
        _check_compiler(kernel)
        found[name.removesuffix("_kernel")] = _resources(compile_launch(kernel, capability, call))
    return found


def _check_compiler(kernel: Any) -> None:
    if not hasattr(kernel, "cache_key"):
        raise RuntimeError("Triton runs as an interpreter; unset TRITON_INTERPRET to compile.")


def _target(capability: tuple[int, int]) -> GPUTarget:
    return GPUTarget("cuda", capability[0] * 10 + capability[1], 32)


def _resources(compiled: Any) -> Resources:
    cubin, ptx = compiled.asm["cubin"], compiled.asm["ptx"]
    usage = _run_tool("cuobjdump", "--dump-resource-usage", cubin)
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    if found is None:
        raise RuntimeError(f"cuobjdump says nothing about registers: {usage!r}")
    registers, stack = int(found[1]), int(found[2])
    in_loops = count_spills_in_loops(_run_tool("nvdisasm", "-c", cubin)) if stack else 0
    is_serialized = "wgmma" in ptx and _is_serialized(ptx)
    metadata = compiled.metadata
    memory = (metadata.shared, metadata.tmem_size)
    return Resources(registers, stack, in_loops, *memory, is_serialized)


def _run_tool(name: str, option: str, cubin: bytes) -> str:
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    if not tool.exists():
        raise RuntimeError(f"this Triton has no {name}, so resources cannot be read.")
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "kernel.cubin")
        file.write_bytes(cubin)
        return subprocess.run(
            [tool, option, file], check=True, capture_output=True, text=True
        ).stdout


def count_spills_in_loops(disassembly: str) -> int:
    """Loads and stores of local memory that execution can come back to.

    Rare branches stand behind the end of the code and jump back into it, so a label and a later
    jump to it need not be a loop.

    Args:
        disassembly: Of one kernel, as `nvdisasm -c` prints it.
    """
    labels: dict[str, int] = {}
    instructions: list[str] = []
    for line in disassembly.splitlines():
        if label := re.match(r"\s*([.$]\S+):", line):
            labels[label[1]] = len(instructions)
        elif instruction := re.search(r"/\*[0-9a-f]{4,}\*/\s+(.*?)\s*;", line):
            instructions.append(instruction[1])
    successors = _successors(instructions, labels)
    spills = [i for i, text in enumerate(instructions) if re.search(r"\b(LDL|STL)\b", text)]
    return sum(_comes_back(i, successors) for i in spills)


def _successors(instructions: list[str], labels: dict[str, int]) -> list[list[int]]:
    """For each instruction, which can be executed next. Calls return; returns lead nowhere."""
    successors: list[list[int]] = []
    # Where warps that diverged meet, by barrier: execution goes on there after BSYNC.
    meetings: dict[str, int] = {}
    for i, text in enumerate(instructions):
        after: list[int] = []
        if not re.match(r"BRA\s+`|EXIT\b|RET\b", text):
            after.append(i + 1)
        target = re.search(r"`\(([.$]\S+?)\)", text)
        if target and target[1] in labels:
            after.append(labels[target[1]])
            if barrier := re.search(r"BSSY\S* (B\d+)", text):
                meetings[barrier[1]] = labels[target[1]]
        elif (barrier := re.search(r"BSYNC\S* (B\d+)", text)) and barrier[1] in meetings:
            after.append(meetings[barrier[1]])
        successors.append([j for j in after if j < len(instructions)])
    return successors


def _comes_back(start: int, successors: list[list[int]]) -> bool:
    """Whether a path leads from an instruction to itself."""
    seen: set[int] = set()
    ahead = [*successors[start]]
    while ahead:
        i = ahead.pop()
        if i == start:
            return True
        if i not in seen:
            seen.add(i)
            ahead.extend(successors[i])
    return False


def _is_serialized(ptx: str) -> bool:
    """Compile once more and read what the assembler says about it; Triton does not keep that."""
    assembler = cast(Any, nvidia_compiler).get_ptxas(90).path
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "kernel.ptx")
        file.write_text(ptx)
        output = Path(folder, "kernel.cubin")
        said = subprocess.run(
            [assembler, "-v", "--gpu-name=sm_90a", file, "-o", output],
            check=True,
            capture_output=True,
            text=True,
        )
    return "instructions are serialized" in said.stdout + said.stderr
