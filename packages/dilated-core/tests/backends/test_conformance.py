"""The backends of this package pass the suite that every backend must pass."""

import pytest
import torch
from dilated_core.testing import BackendConformance

ALL = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


class TestEager(BackendConformance):
    backend = "eager"
    dtypes = ALL


class TestSdpa(BackendConformance):
    backend = "sdpa"
    dtypes = ALL


@pytest.mark.gpu
class TestEagerOnGpu(BackendConformance):
    backend = "eager"
    device = "cuda"
    dtypes = ALL


@pytest.mark.gpu
class TestSdpaOnGpu(BackendConformance):
    backend = "sdpa"
    device = "cuda"
    dtypes = (torch.float32, torch.bfloat16, torch.float16)
    multiple = 8
    may_refuse = True  # it has no mask of keys on CUDA


def test_a_backend_cannot_replace_a_test():
    with pytest.raises(TypeError, match="Weakened replaces test_any_strides"):

        class Weakened(BackendConformance):
            def test_any_strides(self):
                pass


def test_a_sampled_suite_runs_some_cases_of_every_test():
    class Sampled(BackendConformance):
        is_sampled = True

    every, some = (cls._sample(range(70), 24) for cls in (BackendConformance, Sampled))
    assert list(every) == list(range(70))
    assert some == list(range(0, 70, 3))
    assert Sampled._sample([1, 2], 3) == [1, 2]
    with pytest.raises(TypeError, match="Weakened replaces _sample"):

        class Weakened(BackendConformance):
            @classmethod
            def _sample(cls, values, count):
                return []
