"""The adapters pass core's suite on a GPU that has their kernels; elsewhere each is refused."""

import pytest
import torch
from dilated_core import available_backends, register_backend
from dilated_core.backends.contract import AttentionInputs
from dilated_core.backends.registry import get_backend, unregister_backend
from dilated_core.testing import BackendConformance
from dilated_kernels.flex.backend import flex
from dilated_kernels.vendors.cuda_sdpa import cudnn, efficient
from dilated_kernels.vendors.flash import flash2, flash3, flash4
from dilated_kernels.vendors.xformers import xformers

BACKENDS = (flash2, flash3, flash4, xformers, cudnn, efficient, flex)
HALF = (torch.bfloat16, torch.float16)


@pytest.fixture(autouse=True, scope="module")
def registered():
    missing = [backend for backend in BACKENDS if backend.name not in available_backends()]
    for backend in missing:
        register_backend(backend)
    yield
    for backend in missing:
        unregister_backend(backend.name)


class OnGpu(BackendConformance):
    """The suite, whose small head_dims are filled with zeros for kernels that load 8 at once."""

    device = "cuda"
    dtypes = HALF
    multiple = 8
    may_refuse = True  # they have no mask of keys, and limits of head_dim

    @pytest.fixture(autouse=True)
    def needs_its_kernel(self):
        inputs = AttentionInputs(torch.device(self.device), self.dtypes[0], 4, 64)
        if reasons := get_backend(self.backend).why_not(inputs):
            pytest.skip(" ".join(reasons))


@pytest.mark.gpu
class TestFlash2(OnGpu):
    backend = "flash2"


@pytest.mark.gpu
class TestFlash3(OnGpu):
    backend = "flash3"


@pytest.mark.gpu
class TestFlash4(OnGpu):
    backend = "flash4"


@pytest.mark.gpu
class TestXformers(OnGpu):
    backend = "xformers"


@pytest.mark.gpu
class TestCudnn(OnGpu):
    backend = "cudnn"


@pytest.mark.gpu
class TestEfficient(OnGpu):
    backend = "efficient"
    dtypes = (torch.float32, *HALF)


@pytest.mark.gpu
class TestFlex(OnGpu):
    backend = "flex"
    dtypes = (torch.float32, *HALF)


@pytest.mark.parametrize("backend", BACKENDS, ids=lambda backend: backend.name)
def test_a_machine_without_a_gpu_is_told(backend):
    if torch.cuda.is_available():
        pytest.skip("there is one")
    inputs = AttentionInputs(torch.device("cuda"), torch.bfloat16, 4, 64)
    assert backend.why_not(inputs) == ["the device is cuda; this PyTorch sees no CUDA device."]
