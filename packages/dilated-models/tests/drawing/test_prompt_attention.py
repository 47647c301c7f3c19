"""Rows of attention read from a model's layers."""

import dataclasses

import numpy as np
import pytest
import torch
from dilated_models import LongNetLM
from dilated_models.drawing.prompt_attention import attend_to_prompt


@pytest.mark.parametrize("options", [{}, {"positions": "alibi"}, {"key_conv": 4}])
def test_probabilities_times_values_are_what_the_layers_compute(config, options):
    torch.manual_seed(0)
    model = LongNetLM(dataclasses.replace(config, **options), dtype=torch.float64).eval()
    tokens = torch.randint(61, (45,)).tolist()
    seen = attend_to_prompt(model, tokens, num_rows=5)
    assert seen.rows == [40, 41, 42, 43, 44]
    assert seen.probabilities.shape[:3] == (2, 4, 5)
    calls = []
    for block in model.blocks:
        block.attention.attention.register_forward_hook(
            lambda _, inputs, out: calls.append((inputs[2], out))
        )
    model(torch.tensor([tokens]))
    for layer, (v, out) in enumerate(calls):
        for head in range(4):
            for i, row in enumerate(seen.rows):
                keys = seen.positions[head, i] >= 0
                positions = seen.positions[head, i, keys]
                assert positions.max() <= row
                weights = torch.from_numpy(seen.probabilities[layer, head, i, keys]).double()
                found = weights @ v[0, positions, head]
                torch.testing.assert_close(found, out[0, row, head], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(seen.probabilities.sum(-1), 1, rtol=1e-6)


def test_a_short_prompt_has_fewer_rows(model):
    assert attend_to_prompt(model.eval(), [3, 1, 4], num_rows=8).rows == [0, 1, 2]


def test_the_model_is_left_as_it_was(model):
    attend_to_prompt(model, [1, 2], num_rows=1)
    assert not any(module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize(
    ("tokens", "rows", "message"), [([], 1, "has no token"), ([1], 0, "num_rows is 0")]
)
def test_errors(model, tokens, rows, message):
    with pytest.raises(ValueError, match=message):
        attend_to_prompt(model, tokens, num_rows=rows)
