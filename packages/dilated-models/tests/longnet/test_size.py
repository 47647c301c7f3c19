"""What fits is known before anything is allocated."""

import dataclasses
from typing import Any

import pytest
import torch
from dilated_models import LongNetConfig, LongNetLM
from dilated_models.longnet.size import (
    available_bytes,
    check_memory,
    count_parameters,
    gibibytes,
    model_bytes,
)

DEFAULT = LongNetConfig(num_tokens=1)
NSA: dict[str, Any] = {
    "attention_kind": "nsa",
    "segment_lengths": DEFAULT.segment_lengths,
    "dilation_rates": DEFAULT.dilation_rates,
}


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"tie_embeddings": True, "num_kv_heads": 1},
        {"key_conv": 3, "final_layer_norm": False},
        {"num_encoder_layers": 3, "num_kv_heads": 2},
        NSA,
        NSA | {"num_kv_heads": 2, "attention_options": {"mix": "lse", "window_size": 8}},
        NSA | {"attention_kind": "block_sparse_adaptive", "num_kv_heads": 2},
    ],
    ids=str,
)
def test_all_parameters_are_counted(config: LongNetConfig, change: dict[str, Any]):
    config = dataclasses.replace(config, **change)
    model = LongNetLM(config)
    sizes = count_parameters(config)
    assert sizes.total == sum(parameter.numel() for parameter in model.parameters())
    in_block = sum(parameter.numel() for parameter in model.blocks[0].parameters())
    assert sizes.block + sizes.cross == in_block
    assert model_bytes(config) > 4 * sizes.total


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
