"""Compile the kernels for a GPU that is not there, and read what they use of it.

Registers, spills and shared memory decide whether a configuration is any good, and the compiler
tells them without a GPU. Needs Triton's own compiler, hence not its interpreter.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Collection, Generator, Iterable
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, NamedTuple, cast
from unittest.mock import patch

import torch
import triton
from dilated_core import DilatedPattern
from dilated_core.backends.cache_layout import index_blocks, plan_blocks
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia import compiler as nvidia_compiler
from triton.compiler import ASTSource, make_backend
from triton.runtime import jit

from dilated_kernels.fused import decode_launch, launch
from dilated_kernels.fused.configs import Config, Kind, tabled_config
from dilated_kernels.fused.disassembly import count_spills_in_loops

Kernel = Kind | Literal["delta"]

OPTIONS = ("key_mask", "segments", "order", "blocked", "attended", "negative", "wide")
"""What a launch may have: a key padding mask, packed documents, an order of tiles, blocked offsets
of heads, attended padding, a negative scale, rows of a tile 2³¹ elements apart."""

Call = tuple[tuple[Any, ...], dict[str, Any]]
"""Arguments and keywords of a launch."""


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
    kind: Kernel,
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
        config: Tiles, warps and stages; what `choose_config` takes if None.

    Raises:
        RuntimeError: If Triton runs as an interpreter, or has no disassembler to ask.
        ValueError: If an option is unknown.
    """
    if unknown := set(options) - set(OPTIONS):
        raise ValueError(f"unknown options {sorted(unknown)}; there are {', '.join(OPTIONS)}.")
    kernel: Any = getattr(launch, f"_{kind}_kernel")
    _check_compiler(kernel)

    def choose_config(kind: Kind, *_: Any) -> Config:
        extras = dropout or "key_mask" in options
        return config or tabled_config(kind, dtype, head_dim, capability, precision, extras)

    with _matmul_precision(precision), patch.multiple(launch, choose_config=choose_config):
        calls = attention_launches(
            dtype, head_dim, is_causal=is_causal, dropout=dropout, options=options
        )[kind]
    distinct = {repr(specialize(kernel, capability, call)): call for call in calls}
    found = [_resources(compile_launch(kernel, capability, call)) for call in distinct.values()]
    return Resources(*map(max, zip(*found, strict=True)))


def attention_launches(
    dtype: torch.dtype,
    head_dim: int,
    *,
    is_causal: bool,
    dropout: bool = False,
    options: Collection[str] = (),
) -> dict[Kernel, list[Call]]:
    """What the kernels are launched with, forward and backward, for one branch and for two.

    Args: As for `compile_kernel`.
    """
    B, S, H, H_kv = 1, 1024, 4, 2
    q, dout, out = (torch.empty(B, S, H, head_dim, dtype=dtype) for _ in range(3))
    k, v = (torch.empty(B, S, H_kv, head_dim, dtype=dtype) for _ in range(2))
    lse = torch.empty(B, S, H)
    given = launch.Options(
        is_causal=is_causal,
        scale=-0.1 if "negative" in options else 0.1,
        dropout_p=0.1 if dropout else 0.0,
        dropout_seed=0,
        key_mask=torch.zeros(B, S, dtype=torch.uint8) if "key_mask" in options else None,
        cu_seqlens=torch.tensor([0, S]) if "segments" in options else None,
        tile_order="hilbert" if "order" in options else "row_major",
    )
    names: tuple[Kernel, ...] = ("forward", "delta", "dq", "dk_dv")
    recorders: dict[Kernel, _Recorder] = {name: _Recorder() for name in names}
    kernels: dict[str, Any] = {f"_{name}_kernel": recorder for name, recorder in recorders.items()}
    needs_64_bits = launch.is_wide

    def is_wide(*arguments: Any) -> bool:
        return "wide" in options or needs_64_bits(*arguments)

    with patch.multiple(launch, is_interpreted=lambda: False, is_wide=is_wide, **kernels):
        for (w, r), dlse in ((([256], [1]), None), (([256, 512], [1, 2]), lse)):
            pattern = DilatedPattern(
                w,
                r,
                head_offsets="blocked" if "blocked" in options else "interleaved",
                padding="attended" if "attended" in options else "masked",
            )
            launch.dilated_forward(q, k, v, pattern, given)
            launch.dilated_backward(dout, dlse, q, k, v, out, lse, pattern, given)
    return {name: recorder.calls for name, recorder in recorders.items()}


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
    recorders: dict[str, Any] = {"decode_kernel": _Recorder(), "merge_kernel": _Recorder()}
    with patch.multiple(decode_launch, **recorders):
        for position in positions:
            decode_launch.decode_forward(
                *(q, k, v, keys, values, layout), position=position, scale=0.1
            )
    return {name: recorder.calls for name, recorder in recorders.items()}


class _Recorder:
    """Takes a kernel's place and keeps what it is launched with."""

    def __init__(self) -> None:
        self.calls: list[Call] = []

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def record(*arguments: Any, **keywords: Any) -> None:
            self.calls.append((arguments, keywords))

        return record


@contextmanager
def _matmul_precision(precision: str) -> Generator[None]:
    """PyTorch's setting for float32 products, for a while."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


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
    with _matmul_precision(precision):
        launches = decode_launches(dtype, head_dim, group, [4095])
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
