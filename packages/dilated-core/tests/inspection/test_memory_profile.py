"""The profile of known allocations has their sizes, to the byte."""

import json
import sys

import pytest
import torch
from dilated_core.inspection.memory_profile import MemoryProfile, memory_profile

MB = 2**20


def _allocate(megabytes):
    return torch.empty(megabytes * MB, dtype=torch.uint8)


def test_a_known_sequence_gives_its_peak_to_the_byte():
    with memory_profile() as profile:
        a = _allocate(4)
        b = _allocate(4)
        del a
        c = _allocate(2)
        del b, c
        d = _allocate(1)
    assert profile.peak_bytes == 8 * MB
    assert profile.num_allocations == 4
    assert profile.allocated_bytes == 11 * MB
    assert profile.held_bytes == d.nbytes == MB
    heights = [event.bytes // MB for event in profile.timeline]
    assert heights == [4, 8, 4, 6, 2, 0, 1]
    assert {event.device for event in profile.timeline} == {"cpu"}
    seconds = [event.seconds for event in profile.timeline]
    assert seconds == sorted(seconds)
    assert seconds[0] == 0
    assert 0 < seconds[-1] < 60


def test_memory_within_operators_counts():
    x = torch.ones(MB // 4)
    with memory_profile() as profile:
        y = (x + x) * x
    assert (profile.peak_bytes, profile.num_allocations) == (2 * MB, 2)
    assert profile.held_bytes == y.nbytes


def test_releases_of_older_memory_do_not_count():
    with memory_profile():
        profiled_before = _allocate(4)
    before = _allocate(4)
    with memory_profile() as profile:
        del before, profiled_before
        x = _allocate(1)
    assert profile.peak_bytes == profile.held_bytes == x.nbytes
    assert len(profile.timeline) == 1


def test_an_empty_block_is_an_empty_profile():
    with memory_profile() as profile:
        pass
    assert profile == MemoryProfile()


def test_an_exception_passes_and_the_profile_is_filled():
    def fail():
        _allocate(3)
        raise ArithmeticError

    with pytest.raises(ArithmeticError), memory_profile() as profile:
        fail()
    assert profile.peak_bytes == 3 * MB
    with memory_profile() as profile:  # and the profiler is free again
        _allocate(2)
    assert profile.peak_bytes == 2 * MB


def test_profiles_do_not_nest():
    with memory_profile() as outer:
        x = _allocate(1)
        with pytest.raises(RuntimeError, match="a profiler is already running"), memory_profile():
            pass
        y = _allocate(2)
    assert outer.peak_bytes == x.nbytes + y.nbytes


def test_backward_is_profiled():
    x = torch.ones(MB // 4, requires_grad=True)
    with memory_profile() as profile:
        (x * x).sum().backward()
    assert profile.held_bytes >= x.grad.nbytes
    assert profile.peak_bytes >= 2 * MB


def test_json_has_everything(tmp_path):
    with memory_profile() as profile:
        _allocate(4)
    profile.to_json(tmp_path / "profile.json")
    numbers = json.loads((tmp_path / "profile.json").read_text())
    assert numbers.pop("timeline") == [list(event) for event in profile.timeline]
    assert numbers == {
        "peak_bytes": 4 * MB,
        "allocated_bytes": 4 * MB,
        "num_allocations": 1,
        "held_bytes": 0,
    }


def test_html_needs_nothing_but_itself(tmp_path):
    pytest.importorskip("plotly")
    with memory_profile() as profile:
        _allocate(4)
    profile.to_html(tmp_path / "profile.html")
    page = (tmp_path / "profile.html").read_text(encoding="utf-8")
    assert "peak 4.00 MiB, 1 allocations" in page
    assert "<script src=" not in page.replace("'", '"')
    assert len(page) > 10**6  # plotly.js itself


def test_without_plotly_html_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "plotly.graph_objects", None)
    with pytest.raises(ImportError, match=r"pip install dilated-core\[profile\]"):
        MemoryProfile().to_html(tmp_path / "profile.html")


@pytest.mark.gpu
def test_gpu_memory_is_profiled():
    with memory_profile() as profile:
        x = torch.empty(4 * MB, dtype=torch.uint8, device="cuda")
    assert profile.peak_bytes == x.nbytes
    assert {event.device for event in profile.timeline} == {"cuda:0"}
