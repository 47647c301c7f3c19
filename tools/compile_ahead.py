"""Compile launches of the fused kernels for GPUs that are not there, and read what they use.

Registers, spills and shared memory decide whether a configuration is any good, and the compiler
reports them without a GPU. It compiles the same values that `dilated_kernels.fused.launch.run`
executes. Needs Triton's own compiler, hence not its interpreter.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any, Literal, NamedTuple, cast

import torch
import triton
from dilated_core import DilatedPattern
from dilated_core.backends.cache_layout import index_sections, plan_sections
from dilated_kernels.fused import attention
from dilated_kernels.fused.attention import Accumulation, make_call
from dilated_kernels.fused.decoding import decode_launches
from dilated_kernels.fused.launch import Launch
from dilated_kernels.fused.tuning import Config, Kind, Tuning
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia import compiler as nvidia_compiler
from triton.compiler import ASTSource, make_backend
from triton.runtime import jit

from tools.disassembly import count_spills_in_loops

Kernel = Kind | Literal["delta"]
Capability = tuple[int, int]

OPTIONS = ("key_mask", "segments", "order", "blocked", "attended", "negative", "wide")
"""What a launch may have: a key padding mask, packed documents, an order of tiles, blocked offsets
of heads, attended padding, a negative scale, rows of a tile 2³¹ elements apart."""


class Resources(NamedTuple):
    """What a compiled kernel uses.

    Attributes:
        registers: Per thread; a GPU has at most 255.
        spilled_bytes: Of local memory per thread, where registers did not suffice.
        spills_in_loops: Instructions in loops that read or write them. A value that is stored
            before a loop and loaded after it costs nothing; these would.
        shared_bytes: Of shared memory per program.
        tensor_columns: Of tensor memory per program, which only 10.x has. Where there are too few,
            Triton compiles a trap.
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
    kind: Kernel,
    dtype: torch.dtype,
    head_dim: int,
    capability: Capability,
    *,
    is_causal: bool,
    precision: str = "ieee",
    dropout: bool = False,
    options: Collection[str] = (),
    config: Config | None = None,
) -> Resources:
    """Compile a kernel as it is launched, and read the most that it uses of anything.

    It is compiled for a branch alone and for the first and the last of several, which differ in
    what they read and write; one between reads like the last and writes like the first. Rates,
    grouped queries, lengths and head counts are arguments, so these serve them all.

    Args:
        kind: Which kernel.
        dtype: Of q, k and v.
        head_dim: D.
        capability: Compute capability, such as (9, 0).
        is_causal: As in the call.
        precision: Of float32 products: "ieee" or "tf32".
        dropout: With dropout.
        options: With which of `OPTIONS`.
        config: Tiles, warps and stages; those of the table if None.

    Raises:
        RuntimeError: If Triton runs as an interpreter, or has no disassembler.
        ValueError: If an option is unknown.
    """
    launches = attention_launches(
        dtype, head_dim, capability,
        is_causal=is_causal, precision=precision, dropout=dropout, options=options,
        configs={} if config is None or kind == "delta" else {kind: config},
    )[kind]  # fmt: skip
    distinct = {repr(specialize(launch, capability)): launch for launch in launches}
    found = [resources(launch, capability) for launch in distinct.values()]
    return Resources(*map(max, zip(*found, strict=True)))


def compile_decode(
    dtype: torch.dtype,
    head_dim: int,
    capability: Capability,
    *,
    group: int,
    precision: str = "ieee",
) -> Resources:
    """Compile the two decode kernels for a step of a long context: the most that either uses.

    Args:
        dtype, head_dim, capability, precision: As for `compile_kernel`.
        group: Heads of q per head of k and v; all above 1 make one specialisation.

    Raises:
        RuntimeError: As `compile_kernel`.
    """
    launches = step_launches(dtype, head_dim, group, [4095], precision=precision)
    found = [resources(launch, capability) for launch in launches]
    return Resources(*map(max, zip(*found, strict=True)))


def attention_launches(
    dtype: torch.dtype,
    head_dim: int,
    capability: Capability,
    *,
    is_causal: bool,
    precision: str = "ieee",
    dropout: bool = False,
    options: Collection[str] = (),
    configs: dict[Kind, Config] | None = None,
) -> dict[Kernel, list[Launch]]:
    """The launches of forward and backward, for one branch and for two.

    Args: As for `compile_kernel`, and
        configs: Instead of the table's.
    """
    if unknown := set(options) - set(OPTIONS):
        raise ValueError(f"unknown options {sorted(unknown)}; there are {', '.join(OPTIONS)}.")
    B, S, H, H_kv = 1, 1024, 4, 2
    q, dout, out = (torch.empty(B, S, H, head_dim, dtype=dtype) for _ in range(3))
    k, v = (torch.empty(B, S, H_kv, head_dim, dtype=dtype) for _ in range(2))
    lse, row_values = torch.empty(B, S, H), torch.empty(B, S, H, 2)
    given = attention.Options(
        is_causal=is_causal,
        scale=-0.1 if "negative" in options else 0.1,
        dropout_p=0.1 if dropout else 0.0,
        dropout_seed=0,
        key_padding_mask=torch.zeros(B, S, dtype=torch.bool) if "key_mask" in options else None,
        cu_seqlens=torch.tensor([0, S]) if "segments" in options else None,
    )
    tuning = Tuning(
        capability,
        # In half precision the products have one precision only.
        precision if dtype == torch.float32 else "tf32",
        "hilbert" if "order" in options else "row_major",
        configs or {},
        is_wide="wide" in options,
    )
    found: dict[Kernel, list[Launch]] = {"forward": [], "delta": [], "dq": [], "dk_dv": []}
    for (lengths, rates), dlse in ((([256], [1]), None), (([256, 512], [1, 2]), lse)):
        pattern = DilatedPattern(
            lengths,
            rates,
            head_offsets="blocked" if "blocked" in options else "interleaved",
            padding="attended" if "attended" in options else "masked",
        )
        call = make_call(q, k, v, pattern, given, tuning)
        is_summed = len(rates) > 1
        result = Accumulation(q, call.branches, is_read_unwritten=False)
        dq, dk, dv = (
            Accumulation(x, call.branches, is_read_unwritten=is_summed) for x in (q, k, v)
        )
        found["forward"] += attention.forward_launches(call, result, lse)
        found["delta"].append(attention.delta_launch(dout, out, dlse, lse, row_values))
        found["dq"] += attention.dq_launches(call, dout, row_values, dq)
        found["dk_dv"] += attention.dk_dv_launches(call, dout, row_values, dk, dv)
    return found


def step_launches(
    dtype: torch.dtype,
    head_dim: int,
    group: int,
    positions: Iterable[int],
    *,
    precision: str = "ieee",
) -> list[Launch]:
    """The launches of decoding steps at these positions of a long context.

    Args:
        dtype: Of q, k, v and the cache.
        head_dim: D.
        group: Heads of q per head of k and v.
        positions: Of the newest token.
        precision: Of float32 products.
    """
    pattern = DilatedPattern([256, 512, 1024, 2048, 4096], [1, 2, 4, 6, 12])
    H, H_kv = 4 * group, 4
    sections, num_rows = plan_sections(pattern, H, H_kv, None)
    layout = index_sections(pattern, sections, H, None, torch.device("cpu"))
    q, out = (torch.zeros(2, 1, H, head_dim, dtype=dtype) for _ in range(2))
    k = v = torch.zeros(2, 1, H_kv, head_dim, dtype=dtype)
    keys = values = torch.zeros(2, num_rows, head_dim, dtype=dtype)
    lse = torch.zeros(2, 1, H)
    return [
        launch
        for position in positions
        for launch in decode_launches(
            *(q, k, v, keys, values, layout, out, lse),
            position=position,
            scale=0.1,
            precision=precision if dtype == torch.float32 else "tf32",
        )
    ]


def specialize(launch: Launch, capability: Capability) -> tuple[Any, ...]:
    """Signature, constants, attributes and options that Triton derives from a launch."""
    if not hasattr(launch.kernel, "cache_key"):
        raise RuntimeError("Triton runs as an interpreter; unset TRITON_INTERPRET to compile.")
    backend: Any = make_backend(_target(capability))
    make_bind = cast(Any, jit).create_function_from_signature
    bind: Any = make_bind(launch.kernel.signature, launch.kernel.params, backend)
    bound, specialization, options = bind(*launch.arguments, **launch.constants)
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


def compile_launch(launch: Launch, capability: Capability) -> Any:
    """The compiled kernel of a launch, as Triton returns it."""
    *arguments, options = specialize(launch, capability)
    source = cast(Any, ASTSource)(launch.kernel, *arguments)
    return cast(Any, triton.compile)(source, target=_target(capability), options=options)


def resources(launch: Launch, capability: Capability) -> Resources:
    """Compile a launch, and read what it uses.

    Raises:
        RuntimeError: As `compile_kernel`.
    """
    compiled = compile_launch(launch, capability)
    cubin, ptx = compiled.asm["cubin"], compiled.asm["ptx"]
    usage = _run_tool("cuobjdump", "--dump-resource-usage", cubin)
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    if found is None:
        raise RuntimeError(f"cuobjdump printed nothing about registers: {usage!r}")
    registers, stack = int(found[1]), int(found[2])
    in_loops = count_spills_in_loops(_run_tool("nvdisasm", "-c", cubin)) if stack else 0
    is_serialized = "wgmma" in ptx and _is_serialized(ptx)
    metadata = compiled.metadata
    memory = (metadata.shared, metadata.tmem_size)
    return Resources(registers, stack, in_loops, *memory, is_serialized)


def _target(capability: Capability) -> GPUTarget:
    return GPUTarget("cuda", capability[0] * 10 + capability[1], 32)


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


def _is_serialized(ptx: str) -> bool:
    """Assemble once more and read the assembler's remarks, which Triton does not keep."""
    assembler = cast(Any, nvidia_compiler).get_ptxas(90).path
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "kernel.ptx")
        file.write_text(ptx)
        output = Path(folder, "kernel.cubin")
        done = subprocess.run(
            [assembler, "-v", "--gpu-name=sm_90a", file, "-o", output],
            check=True,
            capture_output=True,
            text=True,
        )
    return "instructions are serialized" in done.stdout + done.stderr
