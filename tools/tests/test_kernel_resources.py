"""The record of what the kernels use of a GPU belongs to the kernels as they are."""

import json

import pytest

from tools import kernel_resources


def test_the_record_covers_what_ships():
    assert kernel_resources.main(["--check"]) == 0


@pytest.fixture
def rows():
    return json.loads(kernel_resources.RESULT.read_text())["rows"]


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"spilled_bytes": 8}, "spills 8 bytes"),
        ({"spills_in_loops": 2}, "spills in a loop"),
        ({"is_serialized": True}, "products wait for each other"),
        ({"shared_bytes": 240000}, "240000 bytes of shared memory"),
        ({"tensor_columns": 608}, "608 columns of tensor memory"),
        ({"config": [16, 16, 1, 1]}, r"compiled with \[16, 16, 1, 1\]"),
        (None, "not compiled"),
    ],
)
def test_what_does_not_fit_is_named(rows, change, problem):
    name = next(name for name in rows if name.startswith("forward"))
    if change is None:
        del rows[name]
    else:
        rows[name].update(change)
    (found,) = kernel_resources.problems(rows)
    assert found.startswith(name)
    assert problem.replace("\\", "") in found


@pytest.mark.parametrize("source", kernel_resources.SOURCES)
def test_changed_kernels_need_a_new_record(monkeypatch, capsys, source):
    hashes = kernel_resources.sources_hashes() | {source: "another"}
    monkeypatch.setattr(kernel_resources, "sources_hashes", lambda: hashes)
    assert kernel_resources.main(["--check"]) == 1
    assert "the kernels changed" in capsys.readouterr().out
