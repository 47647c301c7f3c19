import os
from dataclasses import replace

import pytest
import torch
from hypothesis import settings

# Triton's interpreter takes a second for what a GPU does in microseconds, and it must be chosen
# before the kernels' modules are imported.
IS_INTERPRETED = not torch.cuda.is_available()
if IS_INTERPRETED:
    os.environ.setdefault("TRITON_INTERPRET", "1")

settings.register_profile("interpreter", max_examples=3)
settings.register_profile("exhaustive", max_examples=50)


def pytest_configure(config):
    if config.option.markexpr == "exhaustive":
        settings.load_profile("exhaustive")
    elif IS_INTERPRETED:
        settings.load_profile("interpreter")
        speed_up_interpreter()


def speed_up_interpreter():
    """Skip two things that take half of the interpreter's time; exhaustive runs have both.

    It patches `triton.language` again at each call of a device function, and checks each integer
    operation for overflow.
    """
    from triton.runtime import interpreter

    builder = interpreter.interpreter_builder
    builder.options = replace(builder.options, sanitize_overflow=False)
    patch_language, run_grid = interpreter._patch_lang, interpreter.GridExecutor.__call__
    patched = set()

    def patch_language_once(fn):
        modules = {id(value) for value in fn.__globals__.values()}
        key = frozenset(modules & {id(interpreter.tl), id(interpreter.tl.core)})
        if key in patched:
            return None
        patched.add(key)
        return patch_language(fn)

    def run_grid_patched_once(self, *arguments, **keywords):
        patched.clear()
        try:
            return run_grid(self, *arguments, **keywords)
        finally:
            patched.clear()

    interpreter._patch_lang = patch_language_once
    interpreter.GridExecutor.__call__ = run_grid_patched_once


def pytest_collection_modifyitems(items):
    if IS_INTERPRETED:
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="no CUDA device"))
