"""A measurement in a file: what it makes "auto" take, and what it is refused for."""

import json

import pytest
import torch
from dilated_core import AttentionInputs, DilatedPattern, explain_backends
from dilated_core.backends import registry
from dilated_core.backends.eager import EagerBackend
from dilated_core.backends.sdpa import SdpaBackend
from dilated_kernels.ranking import measured
from dilated_kernels.ranking.file import Case, MeasuredChoice, Timing
from dilated_kernels.ranking.measured import (
    device_name,
    installed_versions,
    use_measured_choice,
)

CPU = torch.device("cpu")


class Third(EagerBackend):
    """A backend that may be in a measurement or not; in the table, here a constant, it is first."""

    name = "third"
    priority = 30


@pytest.fixture(autouse=True)
def three_backends(monkeypatch):
    backends = {"eager": EagerBackend(), "sdpa": SdpaBackend(), "third": Third()}
    monkeypatch.setattr(registry, "_registered", backends)
    monkeypatch.setattr(registry, "_broken", {})
    monkeypatch.setattr(registry, "_entry_points_read", True)
    registry.forget_choices()
    yield
    use_measured_choice(None)


def timings(**seconds):
    """Timings by name: seconds forward, and seconds forward and backward; or why it was refused."""
    return tuple(
        Timing(name, None, None, value) if isinstance(value, str) else Timing(name, *value, None)
        for name, value in seconds.items()
    )


CASES = (
    # At 100 positions sdpa is fastest, at 10 000 eager is; forward alone, it is the reverse.
    Case("float32", 64, 100, timings(sdpa=(2.0, 3.0), eager=(1.0, 4.0), third=(9.0, 9.0))),
    Case("float32", 64, 10_000, timings(sdpa=(1.0, 4.0), eager=(2.0, 3.0), third=(9.0, 9.0))),
    Case("bfloat16", 64, 100, timings(eager=(1.0, 2.0), third="wrong results: out is off")),
    Case("float16", 64, 100, timings(eager=(1.0, 2.0))),
)


def choice(**changes):
    settings = {
        "device_type": "cpu",
        "device_name": device_name(CPU),
        "num_threads": 2,
        "date": "2026-11-21",
        "versions": installed_versions(),
        "pattern": DilatedPattern([8, 16], [1, 2], head_offsets="blocked"),
        "batch_size": 1,
        "num_heads": 4,
        "is_causal": True,
        "cases": CASES,
    }
    return MeasuredChoice(**(settings | changes))


def auto(dtype=torch.float32, head_dim=64, seq_len=100, device=CPU, **others):
    inputs = AttentionInputs(device, dtype, 8, head_dim, seq_len=seq_len, **others)
    return registry.choose_backend("auto", inputs).name


def test_auto_follows_a_measurement_until_it_is_taken_back():
    assert auto() == "third"
    use_measured_choice(choice())
    assert auto() == "sdpa"
    assert auto(seq_len=10_000) == "eager"
    use_measured_choice(choice(), by="forward")
    assert auto() == "eager"
    assert auto(seq_len=10_000) == "sdpa"
    use_measured_choice(None)
    assert auto() == auto(seq_len=10_000) == "third"
    with pytest.raises(ValueError, match="by is 'backward'; it must be 'forward_backward' or"):
        use_measured_choice(choice(), by="backward")


def test_the_nearest_length_in_ratio_counts():
    use_measured_choice(choice())
    # The middle between 100 and 10 000 is 1000, not 5050.
    assert [auto(seq_len=n) for n in (0, 1, 999, 1001, 10**9)] == [
        *("sdpa", "sdpa", "sdpa", "eager", "eager")
    ]
    assert auto(seq_len=None) == "eager"  # the longest


def test_what_was_not_measured_ranks_as_before():
    use_measured_choice(choice())
    assert auto(head_dim=32) == "third"
    assert auto(dtype=torch.float64) == "third"
    assert auto(device=torch.device("mps")) == "third"
    # A backend that came later keeps its own rank, which is below those that were measured.
    assert auto(dtype=torch.float16) == "eager"
    third = explain_backends(dtype=torch.float16).splitlines()[2]
    assert third == "  third     can run"


def test_what_gave_wrong_results_is_not_taken():
    use_measured_choice(choice())
    assert auto(dtype=torch.bfloat16) == "eager"
    text = explain_backends(dtype=torch.bfloat16)
    assert f"  third     only by name: measured on {device_name(CPU)}, 2026-11-21, 100 " in text
    assert "positions: wrong results: out is off" in text
    inputs = AttentionInputs(CPU, torch.bfloat16, 8, 64)
    assert registry.choose_backend("third", inputs).name == "third"


def test_explanations_name_the_measurement():
    use_measured_choice(choice())
    source = f"measured on {device_name(CPU)}, 2026-11-21, 10000 positions"
    assert explain_backends(seq_len=2000).splitlines()[1:4] == [
        f"  eager     can run, and is what 'auto' takes (rank 100: {source}: 3e+03 ms forward and "
        f"backward)",
        f"  sdpa      can run (rank 99: {source}: 4e+03 ms forward and backward)",
        f"  third     can run (rank 98: {source}: 9e+03 ms forward and backward)",
    ]


def test_a_file_says_the_same(tmp_path):
    path = tmp_path / "choice.json"
    choice().save(path)
    assert MeasuredChoice.load(path) == choice()
    use_measured_choice(str(path))
    assert auto() == "sdpa"
    with pytest.raises(OSError, match=r"nowhere\.json"):
        use_measured_choice(tmp_path / "nowhere.json")
    assert auto() == "sdpa"  # a mistake changes nothing


def test_flops_are_those_of_the_pattern():
    measured, case = choice(), CASES[0]
    settings = {"seq_len": 100, "num_heads": 4, "head_dim": 64, "is_causal": True}
    forward = measured.pattern.flops(**settings)
    backward = measured.pattern.flops(**settings, backward=True)
    assert measured.flops(case, by="forward") == forward
    assert measured.flops(case, by="forward_backward") == forward + backward


def test_another_device_is_refused():
    with pytest.raises(
        ValueError,
        match=r"measured on 'NVIDIA H200', and the cuda devices here are: none. Measure on this",
    ):
        use_measured_choice(choice(device_type="cuda", device_name="NVIDIA H200"))
    with pytest.raises(ValueError, match="measured on 'Another', and the cpu devices here are: "):
        use_measured_choice(choice(device_name="Another"))
    with pytest.raises(ValueError, match="the tpu devices here are: none"):
        use_measured_choice(choice(device_type="tpu"))


def test_of_several_gpus_only_those_like_the_measured_one_follow_it(monkeypatch):
    names = ["NVIDIA H200", "NVIDIA T4", "NVIDIA H200"]
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: names[device.index])
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    use_measured_choice(choice(device_type="cuda", device_name="NVIDIA H200"))
    # Without a GPU sdpa cannot run at all, so eager is next where the measurement rules.
    assert [auto(device=torch.device("cuda", i)) for i in range(3)] == ["eager", "third", "eager"]
    assert auto(device=torch.device("cuda")) == "third"  # the current one
    assert auto() == "third"


@pytest.mark.parametrize(
    ("package", "version", "message"),
    [
        ("torch", "1.0", "torch was 1.0, and is "),
        ("torch", None, "torch was not installed, and is "),
        ("flash-attn-3", "3.0", "flash-attn-3 was 3.0, and is not installed"),
        ("novelty", "0.1", "novelty was 0.1, and is not installed"),
    ],
)
def test_other_versions_are_refused(monkeypatch, package, version, message):
    here = dict.fromkeys(("torch", "dilated-core"), "9.9") | {"flash-attn-3": None}
    monkeypatch.setattr(measured, "installed_versions", lambda: here)
    use_measured_choice(choice(versions=here))
    with pytest.raises(
        ValueError, match=f"with other packages: {message}.*Measure again, with dil"
    ):
        use_measured_choice(choice(versions=here | {package: version}))


def at(record, path):
    for key in path:
        record = record[key]
    return record


DELETE = object()


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (["format"], 2, "format is 2, and this package reads 1."),
        (["format"], DELETE, "the file has no format."),
        (["format"], True, "format is True, which is not of the right type."),
        (["device_name"], DELETE, "the file has no device_name."),
        (["device_name"], 3, "device_name is 3, which is not of the right type."),
        (["surprise"], 1, "the file has unknown fields: surprise."),
        (["num_heads"], 0, "num_heads is 0; it must be above 0."),
        (["is_causal"], 1, "is_causal is 1, which is not of the right type."),
        (["versions", "torch"], 2.15, "the version of torch is 2.15; it must be a string or null."),
        (["pattern", "segment_lengths"], [8], "segment_lengths has 1 entries and dilation_rates 2"),
        (["pattern", "padding"], DELETE, "pattern has no padding."),
        (["cases"], [], "cases is empty."),
        (["cases", 0], 3, "a case is 3; it must be an object."),
        (["cases", 1, "seq_len"], 100, "two cases are of the same size."),
        (["cases", 0, "seq_len"], -1, "seq_len is -1; it must be above 0."),
        (["cases", 0, "dtype"], "int8", "dtype is 'int8'; it must be one of float64, float32"),
        (["cases", 0, "extra"], 3, "a case has unknown fields: extra."),
        (["cases", 0, "timings", 0, "backend"], "eager", "a backend is twice in a case: eager, ea"),
        (["cases", 0, "timings", 0, "forward_s"], 0, "the timing of 'sdpa' is (0, 3.0) with"),
        (["cases", 0, "timings", 0, "forward_s"], None, "it must have two times above 0, or none"),
        (["cases", 0, "timings", 0, "forward_s"], float("nan"), "it must have two times above 0"),
        (["cases", 0, "timings", 0, "forward_s"], float("inf"), "it must have two times above 0"),
        (["cases", 0, "timings", 0, "forward_s"], "1", "forward_s is '1', which is not of the"),
        (["cases", 0, "timings", 0, "refused"], "no", "it must have two times above 0, or none"),
        (["cases", 0, "timings", 0, "refused"], DELETE, "a timing has no refused."),
    ],
)
def test_files_are_read_to_the_last_field(tmp_path, path, value, message):
    file = tmp_path / "choice.json"
    choice().save(file)
    record = json.loads(file.read_text())
    *folders, last = path
    if value is DELETE:
        del at(record, folders)[last]
    else:
        at(record, folders)[last] = value
    file.write_text(json.dumps(record))
    with pytest.raises(ValueError, match=r"choice\.json' is no measured choice: ") as error:
        use_measured_choice(file)
    assert message in str(error.value)


def test_a_file_that_is_no_json_is_refused(tmp_path):
    file = tmp_path / "choice.json"
    for text in ("{", "[1]", "\udcff"):
        file.write_text(text, encoding="utf-8", errors="surrogateescape")
        with pytest.raises(ValueError, match=r"choice\.json' is no measured choice: "):
            use_measured_choice(file)
