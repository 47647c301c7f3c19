"""The kernels compile for GPUs that are not here, without spills and within the shared memory.

A sample; tools/kernel_resources.py compiles everything that ships. It runs in a process of its own,
because the tests beside it may have switched on Triton's interpreter, which compiles nothing.
"""

import inspect
import json
import os
import subprocess
import sys

import pytest
import torch
import triton
from dilated_core import DilatedPattern, dilated_attention
from dilated_kernels.fused import ahead_of_time, configs, launch
from dilated_kernels.fused.disassembly import count_spills_in_loops

_CODE = """
import json, sys, torch
from dilated_kernels.fused.ahead_of_time import Config, compile_kernel
for dtype, arguments, keywords in json.loads(sys.argv[1]):
    if "config" in keywords:
        keywords["config"] = Config(*keywords["config"])
    kind, head_dim, capability = arguments
    resources = compile_kernel(kind, getattr(torch, dtype), head_dim, tuple(capability), **keywords)
    print(json.dumps(resources))
"""

SAMPLE = [
    ("bfloat16", ("forward", 64, (8, 0)), {"is_causal": True}),
    ("bfloat16", ("dq", 64, (8, 0)), {"is_causal": False}),
    ("float16", ("dk_dv", 64, (8, 0)), {"is_causal": True}),
    ("bfloat16", ("forward", 96, (9, 0)), {"is_causal": False}),
    ("bfloat16", ("dq", 128, (9, 0)), {"is_causal": True}),
    ("bfloat16", ("dk_dv", 128, (9, 0)), {"is_causal": True}),
    ("float32", ("forward", 64, (9, 0)), {"is_causal": True, "precision": "ieee"}),
    ("float32", ("dk_dv", 64, (9, 0)), {"is_causal": False, "precision": "tf32"}),
    ("bfloat16", ("forward", 64, (10, 0)), {"is_causal": True}),
    ("bfloat16", ("dk_dv", 256, (10, 0)), {"is_causal": False}),
    *[
        (
            "bfloat16",
            (kind, 64, (9, 0)),
            {"is_causal": True, "dropout": True, "options": ["key_mask", "segments", "order"]},
        )
        for kind in ("forward", "dq", "dk_dv")
    ],
    *[
        ("bfloat16", (kind, 64, (9, 0)), {"is_causal": False, "options": ["blocked", "wide"]})
        for kind in ("forward", "dq", "dk_dv")
    ],
    (
        "bfloat16",
        ("forward", 64, (8, 0)),
        {"is_causal": False, "options": ["attended", "negative"]},
    ),
]

# The tables were chosen with Triton 3.9; older ones keep a few registers more.
SPILLED_BYTES = 0 if tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 9) else 64


def compile_all(sample):
    environment = {name: text for name, text in os.environ.items() if name != "TRITON_INTERPRET"}
    result = subprocess.run(
        [sys.executable, "-c", _CODE, json.dumps(sample)],
        capture_output=True,
        text=True,
        env=environment,
    )
    assert result.returncode == 0, result.stderr
    return [ahead_of_time.Resources(*json.loads(line)) for line in result.stdout.splitlines()]


def test_what_ships_fits():
    for (dtype, (kind, head_dim, capability), keywords), used in zip(
        SAMPLE, compile_all(SAMPLE), strict=True
    ):
        name = f"{kind} {dtype} {head_dim} {capability} {keywords}"
        assert used.spills_in_loops == 0, name
        assert used.spilled_bytes <= SPILLED_BYTES, name
        assert not used.is_serialized, name
        assert 32 <= used.registers <= 255, name
        limit = configs.SHARED_BYTES[configs.generation(capability)]
        assert 0 < used.shared_bytes <= limit, name
        assert used.tensor_columns <= configs.TENSOR_COLUMNS, name


def test_what_does_not_fit_is_seen():
    """Tiles too large and warps too many: otherwise "no spills" would say nothing."""
    hopper, blackwell = ("dk_dv", 128, (9, 0)), ("dk_dv", 256, (10, 0))
    spilling, serialized, trapping = compile_all(
        [
            ("bfloat16", kernel, {"is_causal": True, "config": config})
            for kernel, config in (
                (hopper, [128, 128, 4, 2]),
                (hopper, [64, 128, 16, 2]),
                (blackwell, [32, 128, 8, 2]),
            )
        ]
    )
    assert spilling.spilled_bytes > 64
    assert spilling.spills_in_loops > 0
    assert serialized.is_serialized
    assert trapping.tensor_columns > configs.TENSOR_COLUMNS


@pytest.mark.parametrize("kind", ["forward", "dq", "dk_dv"])
def test_what_is_compiled_is_what_is_launched(kind):
    """A branch alone, and the first and the last of two: which buffers, of which dtype."""
    names = inspect.signature(getattr(launch, f"_{kind}_kernel").fn).parameters
    options = ("key_mask", "segments", "order")
    for given in ((), ahead_of_time.OPTIONS):
        launches = ahead_of_time.attention_launches(
            torch.bfloat16, 64, is_causal=True, dropout=bool(given), options=given
        )
        calls = [dict(zip(names, arguments, strict=False)) for arguments, _ in launches[kind]]
        partial, result = {
            "forward": ("partial", "out"), "dq": ("partial", "dq"), "dk_dv": ("dk_partial", "dk")
        }[kind]  # fmt: skip
        assert [(call[partial] is not None, call[result].dtype) for call in calls] == [
            (False, torch.bfloat16),
            (False, torch.float32),
            (True, torch.bfloat16),
        ]
        for call, (_, keywords) in zip(calls, launches[kind], strict=True):
            assert {name for name in options if call[name] is not None} == set(given) & set(options)
            flags = {"HAS_DROPOUT", "BLOCKED", "WIDE"} | ({"ATTENDED"} & set(keywords))
            assert all(keywords[name] is bool(given) for name in flags)
            assert keywords.get("POSITIVE_SCALE", not given) is not bool(given)
            assert keywords["PRECISION"] == "tf32"


def test_spills_are_counted_where_they_repeat():
    disassembly = """
        /*0000*/  STL [R1], R2 ;
    .L_x_0:
        /*0010*/  LDL R3, [R1] ;
    .L_x_1:
        /*0020*/  STL.64 [R1+0x4], R4 ;
        /*0030*/  @P0 BRA `(.L_x_1) ;
        /*0040*/  @P1 BRA `(.L_x_2) ;
        /*0050*/  LDL R5, [R1] ;
        /*0060*/  @P0 BRA `(.L_x_0) ;
    .L_x_2:
        /*0070*/  LDL.LU R5, [R1] ;
    .L_x_3:
        /*0080*/  BRA `(.L_x_3);
    """
    assert count_spills_in_loops(disassembly) == 3


def test_a_jump_back_from_rare_code_is_no_loop():
    """The compiler puts it behind the end of the code; what stands between repeats nothing."""
    disassembly = """
        /*0000*/  STL [R1], R2 ;
        /*0010*/  BRA.DIV UR9, `(.L_x_2) ;
    .L_x_0:
        /*0020*/  BSSY.RECONVERGENT B1, `(.L_x_1) ;
        /*0030*/  @P0 BRA `(.L_x_3) ;
        /*0040*/  BSYNC.RECONVERGENT B1 ;
    .L_x_1:
        /*0050*/  LDL R3, [R1] ;
        /*0060*/  EXIT ;
    .L_x_2:
        /*0070*/  LDL R4, [R1] ;
        /*0080*/  BRA `(.L_x_0) ;
    .L_x_3:
        /*0090*/  LDL R5, [R1] ;
        /*00a0*/  BSYNC.RECONVERGENT B1 ;
        /*00b0*/  EXIT ;
    """
    assert count_spills_in_loops(disassembly) == 0
    # With a jump back where the branches have met, all three loads repeat.
    loop = disassembly.replace("/*0060*/  EXIT", "/*0060*/  @P1 BRA `(.L_x_0)")
    assert count_spills_in_loops(loop) == 3


@pytest.mark.parametrize(
    ("capability", "generation"),
    [
        *[((8, 0), "ampere"), ((8, 7), "ampere"), ((8, 6), "ada"), ((8, 9), "ada")],
        *[((12, 0), "ada"), ((12, 1), "ada"), ((11, 0), "blackwell")],
        *[((9, 0), "hopper"), ((10, 0), "blackwell"), ((10, 3), "blackwell")],
    ],
)
def test_generations(capability, generation):
    assert configs.generation(capability) == generation


@pytest.mark.parametrize("head_dim", [1, 16, 17, 48, 64, 96, 200, 256])
def test_every_call_has_a_configuration(head_dim):
    for capability in ((8, 0), (9, 0), (10, 0)):
        for kind in ("forward", "dq", "dk_dv"):
            for dtype, precision in (
                (torch.bfloat16, "tf32"),
                (torch.float32, "ieee"),
                (torch.float32, "tf32"),
            ):
                config = configs.tabled_config(kind, dtype, head_dim, capability, precision)
                assert config.block_m in (16, 32, 64, 128)
                assert config.block_n in (16, 32, 64, 128)


def test_tiles_are_no_longer_than_segments():
    arguments = ("forward", torch.bfloat16, 64, torch.device("cpu"))
    assert configs.choose_config(*arguments, 10**6, "tf32")[:2] == (128, 64)
    assert configs.choose_config(*arguments, 33, "tf32")[:2] == (64, 64)
    assert configs.choose_config(*arguments, 1, "tf32")[:2] == (16, 16)


def test_a_mask_or_dropout_takes_smaller_tiles(monkeypatch):
    """Where they would spill otherwise; and a launch says that it has them."""
    arguments = (torch.bfloat16, 64, (9, 0), "tf32")
    plain = configs.tabled_config("forward", *arguments)
    assert configs.tabled_config("forward", *arguments, True) != plain
    asked = []
    choose = launch.choose_config
    monkeypatch.setattr(launch, "choose_config", lambda *a: asked.append(a[-1]) or choose(*a))
    q = torch.zeros(1, 8, 2, 16, requires_grad=True)
    mask = torch.zeros(1, 8, dtype=torch.bool)
    for options in ({}, {"key_padding_mask": mask}, {"dropout_p": 0.5}):
        dilated_attention(
            q, q, q, DilatedPattern([8], [1]), **options, backend="triton"
        ).sum().backward()
    assert asked == [False] * 3 + [True] * 6


def test_unknown_options_are_refused():
    with pytest.raises(ValueError, match=r"unknown options \['causal'\]; there are key_mask, "):
        ahead_of_time.compile_kernel(
            "dq", torch.float32, 64, (9, 0), is_causal=False, options=["causal"]
        )


@pytest.mark.skipif("TRITON_INTERPRET" not in os.environ, reason="compiled here")
def test_an_interpreter_compiles_nothing():
    with pytest.raises(RuntimeError, match="unset TRITON_INTERPRET"):
        ahead_of_time.compile_kernel("forward", torch.float32, 64, (9, 0), is_causal=False)
