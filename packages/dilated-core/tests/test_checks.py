"""Each check of one argument accepts exactly the values that its sentence names."""

import math
import re
from fractions import Fraction

import pytest
import torch
from dilated_core.checks import (
    check_bool,
    check_head_groups,
    check_head_range,
    check_integer,
    check_names,
    check_number,
)


class Index:
    """An integer type of another library, as numpy's are."""

    def __init__(self, value):
        self.value = value

    def __index__(self):
        return self.value


@pytest.mark.parametrize("value", [3, Index(3), torch.tensor(3), torch.tensor([3]).int()])
def test_an_integer_of_any_library_becomes_an_int(value):
    checked = check_integer("n", value, at_least=3, at_most=3)
    assert type(checked) is int
    assert checked == 3


@pytest.mark.parametrize(
    "value", [True, 3.0, "3", None, [3], torch.tensor(True), torch.tensor(3.0), torch.ones(2).int()]
)
def test_what_is_no_integer(value):
    with pytest.raises(TypeError, match=re.escape(f"n is {value!r}; it must be an integer.")):
        check_integer("n", value)


@pytest.mark.parametrize("value", ["False", None, 0, 1, torch.tensor(True)])
def test_what_is_no_bool(value):
    with pytest.raises(TypeError, match=re.escape(f"is_causal is {value!r}; it must be True or")):
        check_bool("is_causal", value)


def test_numbers_stay_symbolic_in_a_compiled_graph():
    """One graph serves all lengths: a second one would raise at `recompile_limit`."""

    def scaled(x, scale):
        return x * check_integer("length", x.shape[0], at_least=1) * check_number("scale", scale)

    compiled = torch.compile(scaled, fullgraph=True, backend="eager", dynamic=True)
    with torch._dynamo.config.patch(recompile_limit=1, fail_on_recompile_limit_hit=True):
        for length in (3, 4, 5):
            x = torch.ones(length)
            assert torch.equal(compiled(x, length / 2), scaled(x, length / 2))


def test_integers_out_of_range():
    with pytest.raises(ValueError, match="n is 2; it must be at least 3"):
        check_integer("n", Index(2), at_least=3)
    with pytest.raises(ValueError, match="n is 4; it must be at most 3"):
        check_integer("n", 4, at_most=3)


@pytest.mark.parametrize("value", [2, 2.0, Fraction(2)])
def test_a_number_of_any_library_becomes_a_float(value):
    """numpy's scalars are `numbers.Real`, as fractions are."""
    checked = check_number("scale", value, above=1)
    assert type(checked) is float
    assert checked == 2


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 10**400])
def test_a_number_must_be_finite(value):
    with pytest.raises(ValueError, match=f"scale is {value}; it must be finite"):
        check_number("scale", value)


@pytest.mark.parametrize(
    ("value", "bounds", "rule"),
    [
        (0, {"above": 0}, "above 0"),
        (-1e-9, {"at_least": 0}, "at least 0"),
        (1.5, {"at_least": 0, "at_most": 1}, "at least 0 and at most 1"),
        (1, {"at_least": 0, "below": 1}, "at least 0 and below 1"),
        (1, {"above": 0, "below": 1}, "above 0 and below 1"),
    ],
)
def test_numbers_out_of_range(value, bounds, rule):
    with pytest.raises(ValueError, match=re.escape(f"share is {value}; it must be {rule}.")):
        check_number("share", value, **bounds)
    assert check_number("share", 0.5, **bounds) == 0.5


@pytest.mark.parametrize("value", [True, "2", None, 2j, torch.tensor(2.0)])
def test_what_is_no_number(value):
    with pytest.raises(TypeError, match=re.escape(f"scale is {value!r}; it must be a number, or")):
        check_number("scale", value, fix=", or None")


def test_counts_of_heads_become_ints():
    assert type(check_head_groups(Index(4), None)) is int
    assert type(check_head_groups(Index(4), Index(2))) is int
    with pytest.raises(ValueError, match="num_heads is 4 and num_kv_heads 3"):
        check_head_groups(4, 3)


@pytest.mark.parametrize(
    ("head_range", "expected"),
    [(None, (0, 4)), ((0, 4), (0, 4)), ([8, 12], (8, 12)), ((Index(2), Index(6)), (2, 6))],
)
def test_a_range_of_heads(head_range, expected):
    checked = check_head_range(head_range, 4)
    assert checked == expected
    assert all(type(number) is int for number in checked)


@pytest.mark.parametrize(
    ("error", "message", "head_range"),
    [
        (TypeError, r"head_range is 6; it must be a pair \(first, total\), such as", 6),
        (TypeError, r"head_range is \(1, 2, 3\); it must be a pair", (1, 2, 3)),
        (TypeError, "head_range is '67'; it must be a pair", "67"),
        (TypeError, "the first head of head_range is True; it must be an integer", (True, 8)),
        (TypeError, "the total of head_range is 8.0; it must be an integer", (0, 8.0)),
        (ValueError, "the first head of head_range is -1; it must be at least 0", (-1, 8)),
        (ValueError, r"is \(9, 12\) and there are 4 heads; the heads 9 to 12 must", (9, 12)),
        (ValueError, r"is \(0, 3\) and there are 4 heads; the heads 0 to 3 must", (0, 3)),
    ],
)
def test_mistakes_in_a_range_of_heads(error, message, head_range):
    with pytest.raises(error, match=message):
        check_head_range(head_range, 4)


@pytest.mark.parametrize(
    ("name", "answer"),
    [
        ("causal", "it is called is_causal, and is passed to forward."),
        ("is_causal", "it is passed to forward."),
        ("softmax_scale", "it is called scale."),
        ("sm_scale", "it is called scale."),
        ("dropout_rate", "it is called dropout."),
        ("attn_dropout", "it is called dropout."),
        ("attention_dropout", "it is called dropout."),
        ("dropout_p", "it is called dropout."),
        # The owner has neither of the words for embed_dim.
        ("dim", "its arguments are scale, dropout, heads."),
        ("num_heads", "it is called heads."),
        ("colour", "its arguments are scale, dropout, heads."),
    ],
)
def test_an_unknown_name_is_answered_with_the_right_one(name, answer):
    known, elsewhere = ("scale", "dropout", "heads"), {"is_causal": "is passed to forward"}
    with pytest.raises(TypeError) as caught:
        check_names("Layer", ["scale", name], known, elsewhere)
    assert str(caught.value) == f"Layer has no argument {name!r}; {answer}"
    check_names("Layer", known, known)
