"""What is timed, what is refused, and that neither depends on the other."""

import time

import pytest
import torch
from dilated_core import AttentionOutput, DilatedPattern
from dilated_core.backends import registry
from dilated_core.backends.eager import EagerBackend
from dilated_core.backends.sdpa import SdpaBackend
from dilated_kernels.ranking import measure
from dilated_kernels.ranking.file import Timing
from dilated_kernels.ranking.measure import measure_backends
from dilated_kernels.ranking.measured import (
    device_name,
    installed_versions,
    use_measured_choice,
)

SMALL = {
    "dtypes": [torch.float32],
    "head_dims": [16],
    "seq_lens": [48],
    "num_heads": 2,
    "pattern": DilatedPattern([16, 32], [1, 2]),
    "seconds": 0.01,
}


class Slow(EagerBackend):
    name, priority = "slow", 50

    def forward(self, *args, **options):
        time.sleep(0.005)
        return super().forward(*args, **options)


class WrongForward(EagerBackend):
    name, priority = "wrong_forward", 49

    def forward(self, *args, **options):
        out, lse = super().forward(*args, **options)
        return AttentionOutput(out * 1.001, lse)


class WrongBackward(EagerBackend):
    name, priority = "wrong_backward", 48

    def backward(self, *args, **options):
        dq, dk, dv = super().backward(*args, **options)
        return dq, dk.roll(1, 1), dv


class Nan(EagerBackend):
    name, priority = "nan", 47

    def backward(self, *args, **options):
        dq, dk, dv = super().backward(*args, **options)
        return dq, dk, dv * float("nan")


class Failing(EagerBackend):
    name, priority = "failing", 46

    def backward(self, *args, **options):
        raise NotImplementedError("no backward here\nand a long trace")


class OnlyByName(EagerBackend):
    name, priority = "only_by_name", -1


class Unable(EagerBackend):
    name, priority = "unable", 45

    def why_not(self, inputs):
        return ["It cannot."]


@pytest.fixture(autouse=True)
def backends(monkeypatch):
    types = (
        *(Slow, WrongForward, WrongBackward, Nan, Failing, OnlyByName, Unable),
        *(SdpaBackend, EagerBackend),
    )
    monkeypatch.setattr(registry, "_registered", {t.name: t() for t in types})
    monkeypatch.setattr(registry, "_entry_points_read", True)
    registry.forget_choices()
    yield
    use_measured_choice(None)


def test_right_backends_are_timed_and_wrong_ones_refused():
    seen = []
    measured = measure_backends(**SMALL, on_case=seen.append)
    assert tuple(seen) == measured.cases
    (case,) = measured.cases
    assert (case.dtype, case.head_dim, case.seq_len) == ("float32", 16, 48)
    by_name = {timing.backend: timing for timing in case.timings}
    assert list(by_name) == [
        *("slow", "wrong_forward", "wrong_backward", "nan", "failing", "sdpa", "eager")
    ]
    for name in ("slow", "sdpa", "eager"):
        timing = by_name[name]
        assert timing.refused is None
        assert timing.forward_s > 0
        assert timing.forward_backward_s > 0
    assert by_name["slow"].forward_s > 0.005
    assert by_name["wrong_forward"].refused.startswith("wrong results: out is off by 1.0e-03 of")
    # Only what is wrong is named.
    assert by_name["wrong_backward"].refused.startswith("wrong results: dk is off by ")
    assert "dq" not in by_name["wrong_backward"].refused
    assert by_name["nan"].refused.startswith("wrong results: dv is off by nan of its norm")
    assert by_name["failing"].refused == "failed with NotImplementedError: no backward here"
    assert all(
        by_name[name].forward_s is None and by_name[name].forward_backward_s is None
        for name in ("wrong_forward", "wrong_backward", "nan", "failing")
    )


def test_the_result_says_on_what_and_can_be_used():
    measured = measure_backends(**SMALL, batch_size=2, is_causal=False)
    assert measured.device_type == "cpu"
    assert measured.device_name == device_name(torch.device("cpu"))
    assert measured.versions == installed_versions()
    assert measured.num_threads == torch.get_num_threads()
    assert (measured.batch_size, measured.num_heads, measured.is_causal) == (2, 2, False)
    assert measured.pattern == SMALL["pattern"]
    assert len(measured.date) == len("2026-11-21")
    use_measured_choice(measured)
    inputs = registry.AttentionInputs(torch.device("cpu"), torch.float32, 2, 16, seq_len=48)
    assert registry.choose_backend("auto", inputs).name in ("sdpa", "eager")


def test_what_a_measurement_refused_is_measured_again_while_it_rules():
    use_measured_choice(measure_backends(**SMALL))
    again = measure_backends(**SMALL).cases[0].timings
    assert "wrong_forward" in [timing.backend for timing in again]


def test_a_default_device_changes_nothing():
    with torch.device("meta"):
        (case,) = measure_backends("cpu", **SMALL).cases
    assert {t.backend: t.refused for t in case.timings}["sdpa"] is None


def test_the_usual_lengths_reach_beyond_the_segments(monkeypatch):
    trials = []
    monkeypatch.setattr(measure, "_Trial", lambda inputs, *_: trials.append(inputs))
    monkeypatch.setattr(measure, "_timing", lambda _, name, seconds: Timing(name, 1.0, 1.0, None))
    measured = measure_backends("cpu")
    assert {case.dtype for case in measured.cases} == {"float32", "bfloat16"}
    lengths = {trial.seq_len for trial in trials}
    assert min(lengths) <= min(measured.pattern.segment_lengths)
    assert max(lengths) > max(measured.pattern.segment_lengths)
    usual = measure._usual_sizes(torch.device("cuda"), torch.bfloat16)
    assert max(usual.seq_lens) > max(measure._PATTERN.segment_lengths)


def test_chosen_backends_are_measured_with_eager():
    def names(backends):
        (case,) = measure_backends(**SMALL, backends=backends).cases
        return [timing.backend for timing in case.timings]

    assert names(["only_by_name"]) == ["only_by_name", "eager"]
    assert names(["eager", "sdpa", "unable"]) == ["sdpa", "eager"]
    with pytest.raises(ValueError, match="backend is 'unheard_of'; it must be"):
        names(["unheard_of"])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_right_results_are_right_in_every_dtype(dtype):
    """The kernels of PyTorch round more often than eager, and are right nevertheless."""
    (case,) = measure_backends(**SMALL | {"dtypes": [dtype], "backends": ["sdpa", "nan"]}).cases
    assert [timing.refused is None for timing in case.timings] == [True, False, True]


@pytest.mark.parametrize("when", ["before", "by another backend"])
def test_a_device_that_fails_altogether_is_no_result(monkeypatch, when):
    """As after an illegal access to memory: then every backend would look wrong."""

    def broken(*args, **options):
        raise RuntimeError("the device is gone")

    def breaking(*args, **options):
        monkeypatch.setattr(EagerBackend, "forward", broken)
        broken()

    if when == "before":
        monkeypatch.setattr(EagerBackend, "forward", broken)
    else:
        monkeypatch.setattr(SdpaBackend, "forward", breaking)
    with pytest.raises(RuntimeError, match="the device is gone"):
        measure_backends(**SMALL)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"head_dims": [16, 0]}, r"head_dims is \(16, 0\); sizes must be above 0."),
        ({"num_heads": -1}, r"num_heads is \(-1,\); sizes must be above 0."),
        ({"batch_size": 0}, r"batch_size is \(0,\); sizes must be above 0."),
        ({"num_heads": 0}, r"num_heads is \(0,\); sizes must be above 0."),
        (
            {"seq_lens": [48, 48]},
            r"seq_lens is \(48, 48\); give at least one value, and each once.",
        ),
        ({"dtypes": []}, r"dtypes is \(\); give at least one value, and each once."),
        ({"device": "quantum"}, r"device is 'quantum', which PyTorch does not know"),
        ({"device": "cuda:99"}, r"device is 'cuda:99', and"),
    ],
)
def test_mistakes(changes, message):
    with pytest.raises(ValueError, match=message):
        measure_backends(**SMALL | changes)


@pytest.mark.gpu
def test_on_a_gpu():
    measured = measure_backends("cuda", seq_lens=[512], seconds=0.01, backends=["sdpa"])
    assert measured.device_name == torch.cuda.get_device_name()
    assert {case.dtype for case in measured.cases} >= {"float16", "float32"}
    assert all(t.refused is None for case in measured.cases for t in case.timings)
    use_measured_choice(measured)
