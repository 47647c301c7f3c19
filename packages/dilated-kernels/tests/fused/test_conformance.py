"""The kernels pass core's suite: in Triton's interpreter, and on a GPU where there is one."""

import pytest
import torch
from dilated_core.testing import BackendConformance

interpreted = pytest.mark.skipif(
    torch.cuda.is_available(), reason="compiled kernels are tested instead"
)


@interpreted
class TestTritonInterpreted(BackendConformance):
    backend = "triton"
    dtypes = (torch.float32, torch.bfloat16, torch.float16)
    is_sampled = True


@interpreted
@pytest.mark.exhaustive
class TestTritonInterpretedInFull(BackendConformance):
    backend = "triton"
    dtypes = (torch.float32, torch.bfloat16, torch.float16)


@pytest.mark.gpu
class TestTritonOnGpu(BackendConformance):
    backend = "triton"
    device = "cuda"
    dtypes = (torch.float32, torch.bfloat16, torch.float16)
