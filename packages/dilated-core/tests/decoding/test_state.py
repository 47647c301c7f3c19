"""A cache is saved and loaded whole: what does not fit is refused, and nothing is half-loaded."""

import math
from collections import OrderedDict

import pytest
import torch
from dilated_core import DecodingCache, DilatedPattern

PATTERN = DilatedPattern([8, 24, 40], [1, 3, 4])
SIZES = {"batch_size": 2, "num_heads": 4, "num_kv_heads": 2, "head_dim": 6}


def filled(**options):
    cache = DecodingCache(PATTERN, **(SIZES | options))
    cache.prefill(*torch.randn(2, cache.batch_size, 20, 2, 6))
    return cache


@pytest.mark.parametrize(
    "positions", [[20, 12], (20, 12), torch.tensor([20, 12]), torch.tensor([20, 12]).int()]
)
@pytest.mark.parametrize("kind", [dict, OrderedDict])
def test_what_fits_is_loaded(positions, kind):
    before, cache = filled(), filled()
    cache.load_state_dict(kind(before.state_dict() | {"positions": positions}))
    assert cache.positions == (20, 12)
    assert {type(position) for position in cache.positions} == {int}
    assert torch.equal(cache.keys, before.keys)
    assert torch.equal(cache.values, before.values)


def test_values_are_copied_as_they_are():
    """NaN in a row that is never read is no reason to refuse a state."""
    state = filled().state_dict()
    state["keys"][0, 0, 0] = math.nan
    cache = filled()
    cache.load_state_dict(state)
    assert torch.equal(cache.keys.isnan(), state["keys"].isnan())


@pytest.mark.parametrize(
    ("error", "message", "change"),
    [
        (ValueError, "an entry of positions is -3; it must be at least 0", {"positions": [0, -3]}),
        (ValueError, "an entry of positions is 101; it must be at most 100",
         {"positions": torch.tensor([101, 0])}),
        (TypeError, r"an entry of positions is 2.5; it must be an integer",
         {"positions": torch.tensor([2.5, 0])}),
        (TypeError, "an entry of positions is True; it", {"positions": torch.tensor([True, True])}),
        (TypeError, "an entry of positions is None; it must be", {"positions": [1, None]}),
        (TypeError, "positions is a str; it must be a tensor or a list", {"positions": "34"}),
        (TypeError, "positions is a int; it must be a tensor or a list", {"positions": 3}),
        (ValueError, "positions has 3 entries; .* here 2", {"positions": [1, 2, 3]}),
        (ValueError, r"positions is a tensor of shape \(\) on cpu; it must have one dimension",
         {"positions": torch.tensor(1)}),
        (ValueError, r"positions is a tensor of shape \(2,\) on meta; it must have one dimension "
         r"and lie on a device that holds values", {"positions": torch.ones(2, device="meta")}),
        (TypeError, "keys is a list; it must be a tensor", {"keys": [1.0]}),
        (TypeError, "values is a NoneType; it must be a tensor", {"values": None}),
        (ValueError, "values is .* of torch.float64 in state_dict and .* of torch.float32 here",
         {"values": filled().values.double()}),
        (ValueError, r"keys is \(3, 88, 6\) of .* in state_dict and \(2, 88, 6\)",
         {"keys": filled(batch_size=3).keys}),
        (ValueError, r"the entries \['extra', 'keys', 'positions', 'values'\]; it", {"extra": 1}),
        (ValueError, r"the entries \['1', 'keys', 'positions', 'values'\]; it", {1: 1}),
    ],
)  # fmt: skip
def test_what_does_not_fit_changes_nothing(error, message, change):
    cache = filled(max_seq_len=100)
    before = cache.state_dict()
    # keys and values of another state, so that half a load would show.
    with pytest.raises(error, match=message):
        cache.load_state_dict(filled(max_seq_len=100).state_dict() | change)
    assert all(torch.equal(before[name], x) for name, x in cache.state_dict().items())


def test_a_missing_entry_and_what_is_no_state():
    cache = filled()
    state = cache.state_dict()
    with pytest.raises(ValueError, match=r"the entries \['keys', 'values'\]; it must have"):
        cache.load_state_dict({name: state[name] for name in ("keys", "values")})
    with pytest.raises(TypeError, match="state_dict is a list; it must be a dict"):
        cache.load_state_dict([state])
    with pytest.raises(ValueError, match="an entry of positions is 4611686018427387905; it must"):
        cache.load_state_dict(state | {"positions": torch.tensor([0, 2**62 + 1])})


def test_a_state_on_another_device_is_loaded():
    cache = DecodingCache(PATTERN, **SIZES, device="meta")
    cache.load_state_dict(filled().state_dict())
    assert cache.position == 20
