"""Compile every kernel that ships for GPUs that are not there, and record what each uses.

`python -m tools.kernel_resources` compiles each line of the table of configurations, for each
head_dim, dtype and causality, plain and with every option, and the kernels without configurations:
delta, and those for decoding. It writes benchmarks/kernel_resources.json. Rows of the same sources
and Triton are kept, so the next run continues a stopped one; from nothing it takes an hour.
`--check` compiles nothing: it fails unless the file covers the configurations, without spills and
within the shared memory.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import multiprocessing
import sys
import tokenize
import warnings
from collections.abc import Iterator
from itertools import pairwise, product
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
RESULT = ROOT / "benchmarks" / "kernel_resources.json"
KERNELS = ROOT / "packages" / "dilated-kernels" / "src" / "dilated_kernels" / "fused"
SOURCES = {
    "attention": ("addressing.py", "arithmetic.py", "forward.py", "backward.py", "attention.py"),
    "decoding": ("arithmetic.py", "decode.py", "decoding.py"),
}

CAPABILITIES = ((8, 0), (8, 6), (9, 0), (10, 0))
HEAD_DIMS = (16, 32, 48, 64, 96, 128, 256)
ARITHMETIC = (
    ("bfloat16", "tf32"),
    ("float16", "tf32"),
    ("float32", "ieee"),
    ("float32", "tf32"),
)
KINDS = ("forward", "dq", "dk_dv")
OPTIONAL = ("key_mask", "segments", "order", "blocked", "attended")

# What a thread of a decoding kernel may put aside before its loop and fetch after it: the assembler
# does so with registers left, it seems to fit one more program on a multiprocessor.
DECODING_SPILLS = 16

Row = dict[str, Any]


class Specialization(NamedTuple):
    """What is compiled at once: a row of the record.

    Attributes:
        kind: "forward", "delta", "dq", "dk_dv", or "decode", whose `merge` comes with it.
        dtype: By its name.
        precision: Of float32 products.
        head_dim: D.
        capability: CUDA compute capability.
        is_causal: Of forward, dq and dk_dv.
        extras: Of the same, with dropout and all that is `OPTIONAL`.
        is_grouped: Of "decode", several heads of q per head of k and v.
    """

    kind: Any
    dtype: str
    precision: str
    head_dim: int
    capability: tuple[int, int]
    is_causal: bool = False
    extras: bool = False
    is_grouped: bool = False


def specializations() -> Iterator[Specialization]:
    """All that ship."""
    both = (False, True)
    for capability, (dtype, precision), head_dim in product(CAPABILITIES, ARITHMETIC, HEAD_DIMS):
        common = (dtype, precision, head_dim, capability)
        for kind, is_causal, extras in product(KINDS, both, both):
            yield Specialization(kind, *common, is_causal=is_causal, extras=extras)
        yield Specialization("delta", *common)
        for is_grouped in both:
            yield Specialization("decode", *common, is_grouped=is_grouped)


def key(one: Specialization) -> str:
    """A specialization as a key of JSON."""
    arithmetic = f"{one.dtype} {one.precision}" if one.dtype == "float32" else one.dtype
    if one.kind == "decode":
        variant = "grouped" if one.is_grouped else "single"
    elif one.kind == "delta":
        variant = "all"
    else:
        variant = ("causal" if one.is_causal else "full") + (" with options" if one.extras else "")
    major, minor = one.capability
    return f"{one.kind} | {arithmetic} | {one.head_dim} | {major}.{minor} | {variant}"


def sources_hashes() -> dict[str, str]:
    """Which code the kernels were compiled from: comments and docstrings do not count."""
    hashes: dict[str, str] = {}
    for name, files in SOURCES.items():
        code = "\n".join(map(_code, files))
        hashes[name] = hashlib.sha256(code.encode()).hexdigest()[:16]
    return hashes


def _code(file: str) -> str:
    """The tokens of a file that are neither comments nor whole statements of text."""
    ignored = (tokenize.COMMENT, tokenize.NL)
    with (KERNELS / file).open("rb") as source:
        tokens = [
            token for token in tokenize.tokenize(source.readline) if token.type not in ignored
        ]
    around = (tokenize.ENCODING, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT)
    words = (
        token.string.strip()  # versions of Python differ in the text of a NEWLINE
        for before, token in pairwise(tokens)
        if not (token.type == tokenize.STRING and before.type in around)
    )
    return " ".join(filter(None, words))


def configuration(one: Specialization) -> list[int] | None:
    """Tiles, warps and stages in the table; None for kernels that are not in it."""
    import torch
    from dilated_kernels.fused.configs import tabled_config

    if one.kind not in KINDS:
        return None
    dtype = getattr(torch, one.dtype)
    return list(
        tabled_config(one.kind, dtype, one.head_dim, one.capability, one.precision, one.extras)
    )


def compile_one(one: Specialization) -> tuple[str, Row]:
    """Resources and configuration of one specialization."""
    import torch

    from tools.compile_ahead import compile_decode, compile_kernel

    common = (getattr(torch, one.dtype), one.head_dim, one.capability)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if one.kind == "decode":
            group = 4 if one.is_grouped else 1
            return key(one), compile_decode(*common, group=group, precision=one.precision)._asdict()
        used = compile_kernel(
            one.kind,
            *common,
            is_causal=one.is_causal,
            precision=one.precision,
            dropout=one.extras,
            options=OPTIONAL if one.extras else (),
        )
    return key(one), {"config": configuration(one), **used._asdict()}


def problems(rows: dict[str, Row]) -> list[str]:
    """What is missing in the rows, or does not fit."""
    from dilated_kernels.fused.configs import SHARED_BYTES, TENSOR_COLUMNS, generation

    found: list[str] = []
    for one in specializations():
        row = rows.get(key(one))
        if row is None:
            found.append(f"{key(one)}: not compiled")
            continue
        config = configuration(one)
        if row.get("config") != config:
            found.append(f"{key(one)}: compiled with {row.get('config')}, not {config}")
        if row["spills_in_loops"]:
            found.append(f"{key(one)}: spills in a loop")
        if row["spilled_bytes"] > (DECODING_SPILLS if one.kind == "decode" else 0):
            found.append(f"{key(one)}: spills {row['spilled_bytes']} bytes")
        if row["is_serialized"]:
            found.append(f"{key(one)}: products wait for each other")
        if row["shared_bytes"] > SHARED_BYTES[generation(one.capability)]:
            found.append(f"{key(one)}: {row['shared_bytes']} bytes of shared memory")
        if row["tensor_columns"] > TENSOR_COLUMNS:
            found.append(f"{key(one)}: {row['tensor_columns']} columns of tensor memory")
    return found


def write(version: str, rows: dict[str, Row]) -> None:
    """Write the record, a line for each row."""
    head = json.dumps({"triton": version, "sources": sources_hashes()})[1:-1]
    lines = [f" {json.dumps(name)}: {json.dumps(row)}" for name, row in sorted(rows.items())]
    RESULT.write_text("\n".join([f"{{{head},", '"rows": {', ",\n".join(lines), "}}"]) + "\n")


def source_of(name: str) -> str:
    """Which of SOURCES a row was compiled from."""
    return "decoding" if name.startswith("decode") else "attention"


def main(arguments: list[str] | None = None) -> int:
    """Compile the missing rows, or with `--check` only check the file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--processes", type=int, default=2)
    options = parser.parse_args(arguments)
    import triton

    recorded: dict[str, Any] = json.loads(RESULT.read_text()) if RESULT.exists() else {}
    hashes = recorded.get("sources", {})
    stale = {name for name, digest in sources_hashes().items() if digest != hashes.get(name)}
    rows: dict[str, Row] = recorded.get("rows", {})
    if not options.check:
        rows = {
            name: row
            for name, row in rows.items()
            if recorded.get("triton") == triton.__version__ and source_of(name) not in stale
        }
        todo = [
            one
            for one in specializations()
            if key(one) not in rows or rows[key(one)].get("config") != configuration(one)
        ]
        context = multiprocessing.get_context("spawn")
        with context.Pool(options.processes) as pool:
            for i, (name, row) in enumerate(pool.imap_unordered(compile_one, todo)):
                rows[name] = row
                if i % 20 == 19 or i + 1 == len(todo):
                    print(f"{i + 1} of {len(todo)}: {name}: {row}", flush=True)
                    write(triton.__version__, rows)
        names = {key(one) for one in specializations()}
        write(triton.__version__, rows := {name: rows[name] for name in rows if name in names})
    elif stale:
        print("the kernels changed since they were compiled; run python -m tools.kernel_resources")
        return 1
    for problem in (found := problems(rows)):
        print(problem)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
