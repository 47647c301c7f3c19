"""`dilated info`, in this process: what it says, measures, keeps and refuses."""

import sys
from typing import Any

import pytest
import torch
from dilated_core import AttentionOutput, DilatedPattern, explain_backends
from dilated_core.backends.sdpa import SdpaBackend
from dilated_models.cli.app import app
from typer.testing import CliRunner


def info(*arguments: object, code: int = 0) -> Any:
    result = CliRunner().invoke(app, ["info", *map(str, arguments)])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == code, result.output
    return result


def test_info():
    output = info().output
    for expected in ("dilated-models", "torch", "cpu:", "for float32 on cpu", "sdpa", "eager"):
        assert expected in output


def test_info_of_one_device(monkeypatch):
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert "for bfloat16 on mps, 8 heads of 64:" in info().output
    output = info("--device", "cpu").output
    explained = [line for line in output.splitlines() if line.startswith("for ")]
    assert explained == [
        "for float32 on cpu, 8 heads of 64:",
        "for bfloat16 on cpu, 8 heads of 64:",
    ]


SMALL_BENCHMARK = ["--device", "cpu", "--seq-lens", "32,64", "--head-dims", "8", "--heads", "2"]


def test_info_measures_backends_and_keeps_what_it_found(tmp_path):
    pytest.importorskip("dilated_kernels")
    from dilated_kernels.ranking.file import MeasuredChoice

    path = tmp_path / "choice.json"
    result = info("--benchmark", "--save", path, *SMALL_BENCHMARK)
    measured = MeasuredChoice.load(path)
    assert (measured.device_type, measured.num_heads) == ("cpu", 2)
    sizes = [(case.dtype, case.head_dim, case.seq_len) for case in measured.cases]
    assert sizes == [(d, 8, n) for d in ("float32", "bfloat16") for n in (32, 64)]
    rows = result.output.splitlines()
    choices = rows[rows.index("what 'auto' takes without this measurement, and with it:") :]
    for case in measured.cases:
        by_time = sorted((t.forward_backward_s, t.backend) for t in case.timings)
        assert {"sdpa", "eager"} <= {name for _, name in by_time}
        for timing in case.timings:
            flops = measured.flops(case, by="forward_backward")
            (row,) = (
                row.split()
                for row in rows
                if row.split()[:4] == [case.dtype, "8", str(case.seq_len), timing.backend]
            )
            assert row[4] == f"{timing.forward_s * 1e3:.2f}"
            assert row[8] == f"{timing.forward_backward_s * 1e3:.2f}"
            rate = flops / timing.forward_backward_s / 1e9
            assert float(row[10]) == pytest.approx(rate, rel=0.01)
        (dense,) = (
            row.split()
            for row in rows
            if row.split()[:4] == [case.dtype, "8", str(case.seq_len), "dense"]
        )
        every_key = DilatedPattern([case.seq_len], [1])
        flops = every_key.flops(case.seq_len, 2, 8, is_causal=True)
        # The time is printed to 0.01 ms, and the work of so few positions takes little more.
        assert flops / float(dense[6]) / 1e6 == pytest.approx(float(dense[4]), rel=0.1, abs=0.006)
        assert float(dense[6]) > 0
        assert float(dense[10]) > 0
        size = f"{case.dtype}, heads of 8, {case.seq_len} positions"
        assert f"measured {size}" in result.stderr
        (choice,) = (row for row in choices if size in row)
        assert choice.split()[-2:] == ["sdpa", by_time[0][1]]  # before, and after
    assert f"use_measured_choice({str(path)!r})" in result.output
    # Measuring changes nothing by itself.
    assert "measured on" not in explain_backends(head_dim=8)


def test_info_shows_what_is_refused(monkeypatch):
    pytest.importorskip("dilated_kernels")
    forward = SdpaBackend.forward

    def wrong(*args, **options):
        out, lse = forward(*args, **options)
        return AttentionOutput(-out, lse)

    monkeypatch.setattr(SdpaBackend, "forward", wrong)
    output = info("--benchmark", *SMALL_BENCHMARK).output
    assert "sdpa        refused: wrong results: out is off by 2.0e+00 of its norm" in output
    (choice,) = (r for r in output.splitlines() if "  float32, heads of 8, 64 positions" in r)
    assert choice.split()[-2:] == ["sdpa", "eager"]


def test_dense_attention_that_fails_is_a_row(monkeypatch):
    pytest.importorskip("dilated_kernels")

    def fail(*args, **options):
        raise torch.OutOfMemoryError("no memory\nfor it")

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", fail)
    output = info("--benchmark", *SMALL_BENCHMARK).output
    assert output.count("dense       refused: failed with OutOfMemoryError: no memory\n") == 4


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--save", "x"], "--save is 'x' without --benchmark; it must go with --benchmark"),
        (["--seq-lens", "8"], "--seq-lens is '8' without --benchmark; it must go with"),
        (["--head-dims", "8"], "--head-dims is '8' without --benchmark; it must go with"),
        (["--heads", "8"], "--heads is '8' without --benchmark; it must go with"),
        (
            ["--benchmark", "--seq-lens", "8,x"],
            "--seq-lens is '8,x'; it must be integers with commas",
        ),
        (["--benchmark", "--device", "cpu", "--heads", "0"], "--heads is (0,); sizes must be"),
        (["--device", "cuda:9"], "device is 'cuda:9', which this machine does not have"),
        (
            ["--benchmark", "--save", "{dir}"],
            "--save is '{dir}', which is a folder; it must be",
        ),
        (["--benchmark", "--save", "{dir}/a/b"], "there is no folder '{dir}/a'; make it first."),
    ],
)
def test_info_user_errors(tmp_path, arguments, expected):
    if "--benchmark" in arguments:
        pytest.importorskip("dilated_kernels")
    result = info(*(a.format(dir=tmp_path) for a in arguments), code=2)
    assert expected.format(dir=tmp_path) in result.stderr
    assert list(tmp_path.iterdir()) == []


def test_info_without_the_package_that_measures(monkeypatch):
    for name in ("dilated_kernels", "dilated_kernels.ranking.measure"):
        monkeypatch.setitem(sys.modules, name, None)
    result = info("--benchmark", code=2)
    assert result.stderr == (
        "dilated: dilated-kernels is not installed; --benchmark needs it: "
        "pip install 'dilated-models[kernels]'\n"
    )
