"""What importing the package does to a process: nothing but defining names."""

import doctest
import importlib
import pkgutil
import subprocess
import sys

import dilated_core
import pytest

QUIET_IMPORT = """
import os, sys
for name in ("triton", "flash_attn", "xformers", "transformers", "einops", "hypothesis", "pytest"):
    sys.modules[name] = None  # an import of it raises ImportError
before = dict(os.environ)
import torch
state = (torch.get_num_threads(), torch.get_default_dtype(), torch.backends.cuda.matmul.allow_tf32)
import dilated_core
assert dict(os.environ) == before
assert not torch.cuda.is_initialized()
after = (torch.get_num_threads(), torch.get_default_dtype(), torch.backends.cuda.matmul.allow_tf32)
assert state == after
compilers = {"torch._dynamo", "torch._inductor", "torch.utils.flop_counter"}
assert not compilers & set(sys.modules), compilers & set(sys.modules)  # they take seconds
x = torch.ones(1, 6, 2, 4)
pattern = dilated_core.DilatedPattern([4], [1])
assert (dilated_core.dilated_attention(x, x, x, pattern) == 1).all()
"""


def test_cold_import_without_optional_packages():
    run = subprocess.run(
        [sys.executable, "-W", "error", "-c", QUIET_IMPORT], capture_output=True, text=True
    )
    assert (run.returncode, run.stdout, run.stderr) == (0, "", "")


def test_public_names():
    assert sorted(dilated_core.__all__) == [
        "AlibiInputs",
        "AttentionBackend",
        "AttentionInputs",
        "AttentionOptions",
        "AttentionOutput",
        "AttentionRows",
        "AttentionVariant",
        "Branch",
        "DecodingCache",
        "DilatedAttention",
        "DilatedAttentionConfig",
        "DilatedPattern",
        "DynamicDilatedAttention",
        "DynamicDilatedAttentionConfig",
        "Gradients",
        "MappedTensor",
        "MemoryProfile",
        "MultiheadConfig",
        "MultiheadDilatedAttention",
        "Problem",
        "Rotation",
        "Rows",
        "Segments",
        "Span",
        "VisibleKeys",
        "alibi_bias",
        "alibi_slopes",
        "attend_",
        "attention_rows",
        "available_backends",
        "check_decay_range",
        "choose_backend",
        "create_dilated_attention",
        "create_multihead_dilated_attention",
        "decode_step",
        "decode_step_with_lse",
        "decode_tokens",
        "decoding_cache_nbytes",
        "decoding_cache_rows",
        "differentiate_",
        "dilated_attention",
        "dilated_attention_streamed",
        "dilated_attention_with_lse",
        "empty_partial",
        "explain_backends",
        "fold_",
        "head_offset",
        "kept_rows",
        "linear_cross_entropy",
        "memory_profile",
        "merge_partials",
        "plan_problems",
        "recommended_dtype",
        "reference_dilated_attention",
        "reference_dilated_attention_with_lse",
        "register_backend",
        "rotate",
        "rotation_at",
        "select_segments",
        "tensor_sink",
        "tensor_source",
        "unregister_backend",
        "visible_keys",
        "with_alibi",
    ]
    assert all(getattr(dilated_core, name).__doc__ for name in dilated_core.__all__)


MODULES = [m.name for m in pkgutil.walk_packages(dilated_core.__path__, "dilated_core.")]


@pytest.mark.parametrize("name", MODULES)
def test_docstring_examples(name):
    module = importlib.import_module(name)
    names = {n: getattr(dilated_core, n) for n in dilated_core.__all__}
    import torch

    globs = {**vars(module), **names, "torch": torch}
    assert doctest.testmod(module, extraglobs=globs).failed == 0


def test_there_are_docstring_examples():
    finder = doctest.DocTestFinder()
    examples = sum(
        len(t.examples) for name in MODULES for t in finder.find(importlib.import_module(name))
    )
    assert examples >= 20
