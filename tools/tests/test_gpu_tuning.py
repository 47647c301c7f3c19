"""The search for tile sizes: what is replaced while a config is tried, and what is kept."""

import time

import pytest
import torch

from tools.packages import ROOT


@pytest.fixture(autouse=True)
def benchmarks(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))


def test_a_config_holds_for_its_kernels_only_and_for_a_while_only():
    from dilated_kernels.fused import configs, launch
    from gpu_tuning import configured

    asked = (torch.bfloat16, 64, torch.device("cpu"))
    before = launch.choose_config
    usual = before("forward", *asked, 2048, "tf32")
    config = configs.Config(32, 128, 8, 3)
    assert config != usual
    with configured("dq", config):
        assert launch.choose_config("dq", *asked, 2048, "tf32") == config
        assert launch.choose_config("forward", *asked, 2048, "tf32") == usual
        assert launch.choose_config("dq", *asked, max_rows=50, precision="tf32") == (32, 64, 8, 3)
    assert launch.choose_config is before
    assert configs.choose_config is before
    with pytest.raises(ValueError, match="mine"), configured("dq", config):
        raise ValueError("mine")
    assert launch.choose_config is before
    with pytest.raises(RuntimeError, match="no dk_dv kernel asked"), configured("dk_dv", config):
        launch.choose_config("dq", *asked, 2048, "tf32")


def test_a_search_goes_on_where_it_was_stopped(monkeypatch):
    import gpu_tuning
    from gpu_tuning import Config, Problem, best_lines, tune

    tried = []

    def compare(problem, kind, config, inputs):
        tried.append((kind, config))
        if config.block_m == 128:
            raise MemoryError("shared memory\nand more")
        ms = {16: 2.0, 32: 1.0, 64: 1.5}[config.block_m]
        return {"ms": ms, "table_ms": 1.5, "gain": 1.5 / ms}

    monkeypatch.setattr(gpu_tuning, "compare", compare)
    problem = Problem(16, "float32", True, 32, 16, 1, "cpu")
    configs = [Config(m, 16, 4, 2) for m in (16, 32, 64, 128)]
    rows = []
    late = {"deadline": time.monotonic() + 60, "workers": 0}
    search = tune(problem, ["forward"], configs, rows, **late)
    next(search)
    next(search)
    assert len(rows) == 2
    assert not list(tune(problem, ["forward"], configs, rows, deadline=0.0, workers=0))
    list(tune(problem, ["forward", "dq"], configs, rows, **late))
    assert tried == [(kind, config) for kind in ("forward", "dq") for config in configs]
    other = problem._replace(head_dim=32)
    list(tune(other, ["forward"], configs[:1], rows, **late))
    assert len(tried) == 9
    lines = best_lines(rows)
    assert lines[0] == (
        "head_dim 16 float32 causal forward: (32, 16, 4, 2) 1.000 ms (1.500x), "
        "(64, 16, 4, 2) 1.500 ms (1.000x), (16, 16, 4, 2) 2.000 ms (0.750x); 1 of 4 failed"
    )
    assert [row["failed"] for row in rows if "failed" in row] == ["MemoryError: shared memory"] * 2
