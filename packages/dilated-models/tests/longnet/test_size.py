"""What fits is known before anything is allocated."""

import dataclasses

import pytest
import torch
from dilated_models import LongNetConfig, LongNetLM
from dilated_models.longnet.size import (
    available_bytes,
    check_memory,
    gibibytes,
    least_parameters,
    model_bytes,
)


@pytest.mark.parametrize("tied", [True, False])
def test_nearly_all_parameters_are_counted(config: LongNetConfig, tied: bool):
    config = dataclasses.replace(config, d_model=256, dim_feedforward=512, tie_embeddings=tied)
    exact = sum(parameter.numel() for parameter in LongNetLM(config).parameters())
    assert 0.98 * exact < least_parameters(config) < exact
    assert model_bytes(config) > 4 * least_parameters(config)


def test_more_than_there_is_is_refused():
    available = available_bytes(torch.device("cpu"))
    if available is None:
        pytest.skip("this system does not tell its memory")
    assert 1e8 < available < 1e14
    check_memory(available // 2, "the model", torch.device("cpu"), "use a smaller one")
    with pytest.raises(ValueError, match=r"the model needs about .* GiB of memory and cpu has .*"):
        check_memory(2 * available, "the model", torch.device("cpu"), "use a smaller one")


def test_bytes_for_people():
    assert gibibytes(0.25 * 2**30) == "0.2 GiB"
    assert gibibytes(2**50) == "1,048,576 GiB"
