"""Reasons: what is missing, by which rule, and how to get it; and that asking costs nothing."""

import importlib.metadata
import subprocess
import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch
from dilated_core import AttentionBackend
from dilated_core.backends.contract import AttentionInputs
from dilated_kernels import availability
from dilated_kernels.flex.backend import flex
from dilated_kernels.vendors.cuda_sdpa import cudnn, efficient
from dilated_kernels.vendors.flash import FLASH2, FLASH3, FLASH4, flash2, flash3, flash4
from dilated_kernels.vendors.xformers import XFORMERS, xformers

BACKENDS = {b.name: b for b in (flash2, flash3, flash4, xformers, cudnn, efficient, flex)}
LIBRARIES = {"flash2": FLASH2, "flash3": FLASH3, "flash4": FLASH4, "xformers": XFORMERS}
CUDA = torch.device("cuda", 0)


def inputs(**changes):
    values = {"device": CUDA, "dtype": torch.bfloat16, "num_heads": 8, "head_dim": 64, **changes}
    return AttentionInputs(**values)


@pytest.fixture
def machine(monkeypatch):
    """A machine with a Hopper GPU, cuDNN and every library, which can be changed."""

    versions = {
        "flash-attn": "2.8.3.post2",
        "flash_attn_3": "3.0.0",
        "flash-attn-4": "4.0.0b36",
        "xformers": "0.0.35",
    }
    machine = SimpleNamespace(capability=(9, 0), versions=versions, problem="", cudnn=91100)
    monkeypatch.setattr(availability, "cuda_capability", lambda device: machine.capability)
    monkeypatch.setattr(availability, "installed_version", lambda name: machine.versions.get(name))
    monkeypatch.setattr(availability, "import_problem", lambda module: machine.problem)
    monkeypatch.setattr(availability, "cudnn_version", lambda: machine.cudnn)
    monkeypatch.setattr("dilated_kernels.vendors.xformers._kernel_reasons", lambda inputs: [])
    return machine


def test_each_is_a_backend_with_its_rank():
    assert all(isinstance(backend, AttentionBackend) for backend in BACKENDS.values())
    ranks = {name: backend.priority for name, backend in BACKENDS.items()}
    assert ranks == {
        "flash2": 42, "flash3": 43, "flash4": 44, "xformers": 20, "cudnn": 30, "efficient": 15,
        "flex": -1,
    }  # fmt: skip


@pytest.mark.parametrize("name", BACKENDS)
def test_a_hopper_gpu_with_everything_runs_all(machine, name):
    assert BACKENDS[name].why_not(inputs()) == []


@pytest.mark.parametrize(
    ("capability", "name", "reason"),
    [
        ((7, 5), "flash2", "compute capability 7.5; it needs 8.0 or newer"),
        ((8, 0), "flash2", None),
        ((8, 9), "flash2", None),
        ((10, 0), "flash2", None),
        ((8, 0), "flash3", "compute capability 8.0; it runs on 9.0 only"),
        ((10, 0), "flash3", "compute capability 10.0; it runs on 9.0 only"),
        ((8, 9), "flash4", "compute capability 8.9; it runs on 9.0, 10.0, 10.3 only"),
        ((12, 0), "flash4", "compute capability 12.0; it runs on 9.0, 10.0, 10.3 only"),
        ((10, 0), "flash4", None),
        ((7, 5), "cudnn", "compute capability 7.5; it needs 8.0 or newer"),
        ((8, 0), "cudnn", None),
        ((7, 0), "flex", "compute capability 7.0; it needs 7.5 or newer"),
        ((7, 0), "efficient", None),
        ((7, 0), "xformers", None),
        ((3, 7), "efficient", "compute capability 3.7; it needs 5.0 or newer"),
    ],
)
def test_compute_capability(machine, capability, name, reason):
    machine.capability = capability
    reasons = BACKENDS[name].why_not(inputs(dtype=torch.float16))
    assert reasons == ([] if reason is None else [f"the GPU has {reason}."])


@pytest.mark.parametrize("name", ["efficient", "xformers", "flex"])
def test_bfloat16_needs_ampere(machine, name):
    machine.capability = (7, 5)
    (reason,) = BACKENDS[name].why_not(inputs())
    assert reason == (
        "the dtype is bfloat16; the GPU has compute capability 7.5, and bfloat16 needs 8.0."
    )


@pytest.mark.parametrize("name", BACKENDS)
def test_other_devices(machine, name):
    assert BACKENDS[name].why_not(inputs(device=torch.device("mps"))) == [
        "the device is mps; it runs on CUDA devices only."
    ]
    machine.capability = None
    assert BACKENDS[name].why_not(inputs()) == [
        "the device is cuda; this PyTorch sees no CUDA device."
    ]


@pytest.mark.parametrize("name", BACKENDS)
def test_rocm_is_not_cuda(machine, monkeypatch, name):
    monkeypatch.setattr(torch.version, "hip", "6.4")
    (reason,) = BACKENDS[name].why_not(inputs())
    assert reason == "this PyTorch is built for ROCm; it runs on NVIDIA GPUs only."


HALF = "it takes bfloat16, float16"
SINGLE = "it takes float32, bfloat16, float16"


@pytest.mark.parametrize(
    ("name", "dtype", "takes"),
    [
        *((name, torch.float32, HALF) for name in ("flash2", "flash3", "flash4", "cudnn")),
        *((name, torch.float64, SINGLE) for name in ("xformers", "efficient", "flex")),
        *((name, torch.int64, HALF) for name in ("flash2", "flash3", "flash4", "cudnn")),
        *((name, torch.complex64, SINGLE) for name in ("xformers", "efficient", "flex")),
        *((name, torch.bool, SINGLE) for name in ("xformers", "efficient", "flex")),
    ],
)
def test_dtypes(machine, name, dtype, takes):
    shown = str(dtype).removeprefix("torch.")
    assert BACKENDS[name].why_not(inputs(dtype=dtype)) == [f"the dtype is {shown}; {takes}."]


@pytest.mark.parametrize(
    ("name", "dtype", "head_dim", "reason"),
    [
        *((name, torch.float16, 60, "it needs a multiple of 8") for name in BACKENDS
          if name != "flex"),
        ("efficient", torch.float32, 62, "it needs a multiple of 4"),
        ("xformers", torch.float32, 62, "it needs a multiple of 4"),
        ("efficient", torch.float32, 60, None),
        ("xformers", torch.float32, 60, None),
        ("flash2", torch.float16, 256, None),
        ("flash2", torch.float16, 264, "it takes at most 256"),
        ("flash3", torch.float16, 256, None),
        ("flash3", torch.float16, 264, "it takes at most 256"),
        ("flash4", torch.float16, 128, None),
        ("flash4", torch.float16, 136, "it takes at most 128"),
        ("cudnn", torch.float16, 128, None),
        ("cudnn", torch.float16, 136, "it takes at most 128"),
        ("efficient", torch.float16, 512, None),
        ("flex", torch.float16, 5, None),
    ],
)  # fmt: skip
def test_head_dim(machine, name, dtype, head_dim, reason):
    reasons = BACKENDS[name].why_not(inputs(dtype=dtype, head_dim=head_dim))
    assert reasons == ([] if reason is None else [f"head_dim is {head_dim}; {reason}."])


@pytest.mark.parametrize("name", BACKENDS)
def test_dropout_is_refused(machine, name):
    (reason,) = BACKENDS[name].why_not(inputs(dropout_p=0.1))
    assert reason.startswith("dropout_p is 0.1; its dropout cannot be repeated from a seed")


@pytest.mark.parametrize("name", BACKENDS)
def test_key_padding_mask(machine, name):
    reasons = BACKENDS[name].why_not(inputs(has_key_padding_mask=True))
    none = [] if name == "flex" else ["key_padding_mask is given; it has no mask of keys."]
    assert reasons == none


def test_flex_promises_no_limit_of_memory(machine):
    (reason,) = flex.why_not(inputs(max_workspace_bytes=1))
    assert reason.startswith("max_workspace_bytes is 1; PyTorch's compiler chooses")
    assert flash2.why_not(inputs(max_workspace_bytes=1)) == []


@pytest.mark.parametrize("name", LIBRARIES)
def test_a_library_that_is_not_there(machine, name):
    machine.versions.clear()
    (reason,) = BACKENDS[name].why_not(inputs())
    library = LIBRARIES[name]
    assert reason == f"{library.distribution} is not installed; {library.install}."
    assert any(word in reason for word in ("pip install", "setup.py install"))


def test_the_sentence_of_flash2(machine):
    machine.versions.clear()
    assert flash2.why_not(inputs()) == [
        "flash-attn is not installed; pip install 'dilated-kernels[flash]'."
    ]


@pytest.mark.parametrize(
    ("name", "version", "rule"),
    [
        ("flash2", "2.6.3", "2.7.0 or newer"),
        ("flash2", "3.0.0", "a release before 3"),
        ("flash2", "2.7.0.post2", None),
        ("flash2", "2.8.3+cu13torch2.11", None),
        ("flash3", "2.9.9", "3.0.0b1 or newer"),
        ("flash3", "3.0.0b1", None),
        ("flash3", "4.0.0", "a release before 4"),
        ("flash4", "4.0.0b4", "4.0.0b20 or newer"),
        ("flash4", "4.0.0b20", None),
        ("flash4", "4.0.0", None),
        ("flash4", "5.0", "a release before 5"),
        ("xformers", "0.0.34", "0.0.35 or newer"),
        ("xformers", "0.0.35.post1", None),
        ("xformers", "unknown", "0.0.35 or newer"),
    ],
)
def test_versions(machine, name, version, rule):
    library = LIBRARIES[name]
    machine.versions[library.distribution] = version
    reasons = BACKENDS[name].why_not(inputs())
    wanted = f"{library.distribution} is {version}; it needs {rule}: {library.install}."
    assert reasons == ([] if rule is None else [wanted])


@pytest.mark.parametrize("name", LIBRARIES)
def test_a_library_that_is_broken(machine, name):
    machine.problem = "ImportError: undefined symbol"
    (reason,) = BACKENDS[name].why_not(inputs())
    assert "is installed but cannot be imported (ImportError: undefined symbol)" in reason
    assert f"install a build for torch {torch.__version__}" in reason


@pytest.mark.parametrize(("version", "part"), [(None, "finds no cuDNN"), (8907, "cuDNN is 8907")])
def test_cudnn_itself(machine, version, part):
    machine.cudnn = version
    (reason,) = cudnn.why_not(inputs())
    assert part in reason
    assert efficient.why_not(inputs()) == []


def test_all_reasons_of_a_call_come_at_once(machine):
    machine.capability = (7, 5)
    bad = inputs(dtype=torch.float32, head_dim=260, dropout_p=0.5, has_key_padding_mask=True)
    assert len(flash2.why_not(bad)) == 6


@pytest.mark.parametrize("name", LIBRARIES)
def test_nothing_is_looked_up_for_a_call_that_cannot_run(machine, monkeypatch, name):
    def forbidden(*args):
        raise AssertionError("looked up a library")

    monkeypatch.setattr(availability, "installed_version", forbidden)
    monkeypatch.setattr(availability, "import_problem", forbidden)
    assert BACKENDS[name].why_not(inputs(device=torch.device("cpu"))) != []


@pytest.fixture
def module_that_fails(monkeypatch):
    """Import of `broken` raises what is put into `error`."""

    class Finder:
        error: Exception
        calls = 0

        def find_spec(self, name, path=None, target=None):
            if name == "broken":
                self.calls += 1
                raise self.error

    finder = Finder()
    monkeypatch.setattr(sys, "meta_path", [finder, *sys.meta_path])
    availability.import_problem.cache_clear()
    yield finder
    availability.import_problem.cache_clear()


@pytest.mark.parametrize("error", [ImportError, OSError, RuntimeError, AttributeError])
def test_import_problems_are_told_once(module_that_fails, error):
    module_that_fails.error = error("undefined symbol\nand a long list")
    for _ in range(2):
        assert availability.import_problem("broken") == f"{error.__name__}: undefined symbol"
    assert module_that_fails.calls == 1


def test_a_module_that_imports_has_no_problem(monkeypatch):
    monkeypatch.setitem(sys.modules, "works", ModuleType("works"))
    assert availability.import_problem("works") == ""
    availability.import_problem.cache_clear()


def test_installed_versions():
    assert availability.installed_version("torch") == importlib.metadata.version("torch")
    assert availability.installed_version("no-such-distribution") is None


def test_xformers_is_asked_for_its_kernels(monkeypatch):
    from dilated_kernels.vendors import xformers as xformers_backend

    class Operator:
        def __init__(self, *problems):
            self.problems = problems

        def not_supported_reasons(self, question):
            assert question["query"].shape == (1, 8, 8, 64)
            return list(self.problems)

    class Kernel:
        def __init__(self, forward, backward):
            self.FwOp, self.BwOp = forward, backward

    fine, absent = Operator(), Operator("xFormers wasn't build with CUDA support", "and more")
    fmha, ops = ModuleType("xformers.ops.fmha"), ModuleType("xformers.ops")
    fmha.Inputs = dict
    ops.LowerTriangularMask = object
    monkeypatch.setitem(sys.modules, "xformers.ops", ops)
    monkeypatch.setitem(sys.modules, "xformers.ops.fmha", fmha)
    fmha.flash3 = fmha.flash = fmha.cutlass = Kernel(absent, absent)
    cpu = inputs(device=torch.device("cpu"))
    forward, backward = xformers_backend._kernel_reasons(cpu)
    assert forward.startswith("xformers has no kernel for forward (flash3: xFormers wasn't build")
    assert "backward" in backward
    fmha.cutlass = Kernel(fine, absent)
    assert xformers_backend._kernel_reasons(cpu) == [backward]
    fmha.flash = Kernel(absent, fine)
    assert xformers_backend._kernel_reasons(cpu) == []


def test_import_loads_no_library():
    code = (
        "import sys, warnings; before = set(sys.modules)\n"
        "from dilated_kernels import availability\n"
        "from dilated_kernels.flex import backend\n"
        "from dilated_kernels.vendors import adapter, cuda_sdpa, flash\n"
        "from dilated_kernels.vendors import xformers as xformers_backend\n"
        "import torch\n"
        "from dilated_core.backends.contract import AttentionInputs\n"
        "inputs = AttentionInputs(torch.device('cpu'), torch.float32, 4, 8)\n"
        "for b in (flash.flash2, flash.flash4, xformers_backend.xformers, cuda_sdpa.cudnn):\n"
        "    assert b.why_not(inputs)\n"
        "assert not backend.flex.why_not(inputs)\n"
        "loaded = {m.partition('.')[0] for m in sys.modules}\n"
        "assert not loaded & {'flash_attn', 'flash_attn_interface', 'xformers'}, loaded\n"
        "assert 'torch.nn.attention.flex_attention' not in sys.modules\n"
        "assert not torch.cuda.is_initialized()\n"
    )
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True, timeout=120)
