"""The search for tile sizes: what is replaced while a config is tried, and what is kept."""

import time

import pytest

from tools.packages import ROOT


@pytest.fixture(autouse=True)
def benchmarks(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))


def test_a_config_holds_for_a_backend_of_its_own_only():
    from dilated_core.backends.registry import get_backend
    from gpu_contenders import FUSED
    from gpu_tuning import Config, configured

    config = Config(32, 128, 8, 3)
    with configured("dq", None) as name:
        assert name == FUSED
    with configured("dq", config) as name:
        assert get_backend(name).configs == {"dq": config}
        assert get_backend(FUSED).configs == {}
    with pytest.raises(ValueError, match="mine"), configured("dq", config):
        raise ValueError("mine")
    with pytest.raises(ValueError, match="must be 'auto' or one of"):
        get_backend("tuning")


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
