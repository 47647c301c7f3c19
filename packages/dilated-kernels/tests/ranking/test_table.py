"""The order of the backends: the table, each fallback after the other, and the explanations."""

import pytest
import torch
from dilated_core import explain_backends, register_backend
from dilated_core.backends import registry
from dilated_core.backends.contract import AttentionInputs
from dilated_core.backends.eager import EagerBackend
from dilated_core.backends.sdpa import SdpaBackend
from dilated_kernels.fused.backend import TritonBackend
from dilated_kernels.ranking.table import TABLE, Entry, Rank, fits, rank

CHAIN = ["triton", "flash4", "flash3", "flash2", "cudnn", "xformers", "efficient", "sdpa", "eager"]
ORDER = {"triton": 50, "flash4": 44, "flash3": 43, "flash2": 42, "cudnn": 30, "xformers": 20}


class Fake(EagerBackend):
    """Stands for a kernel: ranks itself by the table, and can run until a test forbids it."""

    priority = 1

    def __init__(self, name):
        self.name = name
        self.reasons = []

    def why_not(self, inputs):
        return self.reasons

    def priority_for(self, inputs):
        return rank(self.name, inputs)


@pytest.fixture
def gpu(monkeypatch):
    """Make PyTorch see a GPU of some compute capability."""

    def set_capability(*capability):
        registry.forget_choices()
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)

    return set_capability


@pytest.fixture
def empty_registry(monkeypatch):
    monkeypatch.setattr(registry, "_registered", {})
    monkeypatch.setattr(registry, "_broken", {})
    monkeypatch.setattr(registry, "_entry_points_read", True)
    registry.forget_choices()
    yield
    registry.forget_choices()


@pytest.fixture
def fakes(empty_registry):
    """Every backend of the family by name, registered worst first."""
    backends = {name: Fake(name) for name in ("flex", *reversed(CHAIN[:-2]))}
    backends["eager"], backends["sdpa"] = EagerBackend(), SdpaBackend()
    backends["sdpa"].why_not = lambda inputs: []
    for backend in backends.values():
        register_backend(backend)
    return backends


def on_gpu(**changes):
    return AttentionInputs(torch.device("cuda", 0), torch.float32, 8, 64)._replace(**changes)


def auto(inputs):
    return registry.choose_backend("auto", inputs).name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_each_step_of_the_chain_falls_back_to_the_next(gpu, fakes, dtype):
    gpu(9, 0)
    chain = list(CHAIN)
    if dtype != torch.float32:  # sdpa is flash attention there, and comes before the other kernel
        chain[-3:] = ["sdpa", "efficient", "eager"]
    for step, name in enumerate(chain):
        inputs = on_gpu(dtype=dtype, seq_len=1000 + step)
        assert auto(inputs) == name
        lines = explain_backends(device="cuda:0", dtype=dtype).splitlines()[1:]
        assert [line.split()[0] for line in lines[: len(chain) + 1]] == [*chain, "flex"]
        for gone, line in zip(chain[:step], lines, strict=False):
            assert line == f"  {gone:<9} cannot run: {gone} is on holiday."
        assert "can run, and is what 'auto' takes" in lines[step]
        assert all("auto" not in line for i, line in enumerate(lines) if i != step)
        # An explicit name is not replaced, whatever else could run.
        assert registry.choose_backend(name, inputs) is fakes[name]
        fakes[name].why_not = lambda inputs, name=name: [f"{name} is on holiday."]
        registry.forget_choices()
        with pytest.raises(ValueError, match=f"'{name}' cannot run .* {name} is on holiday. Use"):
            registry.choose_backend(name, inputs)
    with pytest.raises(ValueError, match=r"(?s)no backend can run.*flex      only by name"):
        auto(on_gpu(dtype=dtype, seq_len=1))


def test_explanations_say_where_a_rank_comes_from(gpu, fakes):
    gpu(9, 0)
    text = explain_backends(device="cuda:0")
    for name, value in ORDER.items():
        assert f"  {name:<9} can run" in text
        assert f"(rank {value}: by design, not yet measured on a GPU)" in text
    assert "  flex      only by name: it has to be compiled for each pattern and shape" in text


@pytest.mark.parametrize("capability", [(6, 0), (7, 0), (7, 5)])
def test_gpus_older_than_ampere(gpu, empty_registry, capability):
    """Pascal, Volta and Turing: float32 and float16 by PyTorch's kernels, bfloat16 by eager."""
    gpu(*capability)
    for backend in (TritonBackend(), SdpaBackend(), EagerBackend()):
        register_backend(backend)
    assert auto(on_gpu()) == auto(on_gpu(dtype=torch.float16)) == "sdpa"
    assert auto(on_gpu(dtype=torch.bfloat16)) == "eager"
    lines = explain_backends(device="cuda:0", dtype=torch.bfloat16).splitlines()
    assert lines[1:4] == [
        "  triton    cannot run: the GPU has compute capability "
        f"{capability[0]}.{capability[1]}; it needs 8.0 or newer.",
        "  sdpa      cannot run: the dtype is bfloat16; this GPU is older than compute capability "
        "8.0.",
        "  eager     can run, and is what 'auto' takes",
    ]


def test_ampere_is_not_older_than_ampere(gpu, fakes):
    gpu(8, 0)
    assert auto(on_gpu()) == "triton"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_interpreted_kernels_are_never_taken_by_themselves(fakes, dtype):
    inputs = AttentionInputs(torch.device("cpu"), dtype, 8, 64)
    for name in CHAIN[1:-1]:
        fakes[name].why_not = lambda inputs: ["It needs a GPU."]
    assert auto(inputs) == "eager"
    assert registry.choose_backend("triton", inputs).name == "triton"
    text = explain_backends(dtype=dtype)
    assert "  triton    only by name: on a CPU its kernels run in Triton's interpreter" in text


def test_a_gpu_that_is_not_there_is_explained_all_the_same(fakes):
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    assert rank("triton", on_gpu()) == Rank(50, "by design, not yet measured on a GPU")
    assert "for float32 on cuda" in explain_backends(device="cuda")


def inputs_of(entry):
    """Inputs that `entry` is meant for, and the compute capability of their device."""
    capability = entry.from_capability or (9, 0)
    kind = entry.device or "cuda"
    return capability, AttentionInputs(
        torch.device(kind, 0 if kind == "cuda" else None),
        entry.dtypes[0] if entry.dtypes else torch.float32,
        8,
        entry.head_dims[-1] if entry.head_dims else 64,
        seq_len=entry.seq_lens[0] if entry.seq_lens else None,
    )


@pytest.mark.parametrize("entry", TABLE, ids=lambda entry: f"{entry.backend}{entry.value}")
def test_every_line_of_the_table_can_be_reached(gpu, entry):
    capability, inputs = inputs_of(entry)
    gpu(*capability)
    assert rank(entry.backend, inputs) == (entry.value, entry.origin)
    assert entry.origin


def test_every_backend_has_a_rank_for_everything(gpu):
    """The last line of each has no condition, and a rank of its own: no two backends tie."""
    last = {entry.backend: entry for entry in TABLE}
    for entry in last.values():
        assert entry == Entry(*entry[:3])
    assert set(last) == {*CHAIN[:-2], "flex"}
    values = [entry.value for entry in last.values()] + [10, 0]  # sdpa and eager
    assert len(set(values)) == len(values)
    with pytest.raises(ValueError, match="no line of the table ranks 'sdpa'; it has triton, flash"):
        rank("sdpa", on_gpu())


@pytest.mark.parametrize(
    ("conditions", "right", "wrong"),
    [
        ({"device": "cuda"}, {}, {"device": torch.device("cpu")}),
        ({"dtypes": (torch.float16,)}, {"dtype": torch.float16}, {"dtype": torch.bfloat16}),
        ({"head_dims": range(64, 129)}, {"head_dim": 128}, {"head_dim": 129}),
        ({"head_dims": range(64, 129)}, {"head_dim": 64}, {"head_dim": 63}),
        ({"seq_lens": range(10, 20)}, {"seq_len": 10}, {"seq_len": 20}),
        ({"seq_lens": range(10, 20)}, {"seq_len": 19}, {"seq_len": None}),
        ({"from_capability": (8, 6)}, {}, {"device": torch.device("cpu")}),
        ({"from_capability": (8, 6)}, {}, {"device": torch.device("mps")}),
    ],
)
def test_conditions_of_a_line(gpu, conditions, right, wrong):
    gpu(8, 6)
    entry = Entry("triton", 1, "a test", **conditions)
    assert fits(entry, on_gpu(**right))
    assert not fits(entry, on_gpu(**wrong))


def test_conditions_on_the_generation(gpu):
    entry = Entry("triton", 1, "a test", from_capability=(8, 6))
    for capability, expected in {(7, 5): False, (8, 0): False, (8, 6): True, (9, 0): True}.items():
        gpu(*capability)
        assert fits(entry, on_gpu()) is expected
