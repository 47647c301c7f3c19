import os

import pytest
import torch
from hypothesis import settings

if not torch.cuda.is_available():
    # The kernels then run in Triton's interpreter, which must be asked for before their modules are
    # imported. It takes a second for what a GPU does in microseconds.
    os.environ.setdefault("TRITON_INTERPRET", "1")
    settings.register_profile("interpreter", max_examples=12)
    settings.load_profile("interpreter")


def pytest_collection_modifyitems(items):
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="no CUDA device"))
