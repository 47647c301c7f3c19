"""Checks of single arguments, one per kind of value; each error gives the value, rule and fix."""

from __future__ import annotations

import inspect
import math
import operator
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence, Set
from functools import wraps
from numbers import Real
from typing import Any, TypeGuard, TypeVar, cast

import torch

Config = TypeVar("Config")


def check_bool(name: str, value: object) -> bool:
    """`value` itself, if it is a bool. A string such as "False" would count as true.

    Raises:
        TypeError: If it is anything else.
    """
    if not isinstance(value, bool):
        raise TypeError(f"{name} is {value!r}; it must be True or False.")
    return value


def is_listed(value: object) -> TypeGuard[Iterable[Any]]:
    """Whether a value lists entries in an order that its writer chose.

    A mapping does not, whose entries are its keys, nor does a set or a string.
    """
    return isinstance(value, Iterable) and not isinstance(value, (Mapping, Set, str))


def check_integer(
    name: str, value: Any, *, at_least: int | None = None, at_most: int | None = None
) -> int:
    """`value` as an int, if it is an integer (of Python, numpy or a compiler) in the range.

    Raises:
        TypeError: If it is not an integer; True and False are none.
        ValueError: If it is out of range.
    """
    number = _integer(value)
    if number is None:
        raise TypeError(f"{name} is {value!r}; it must be an integer.")
    if at_least is not None and number < at_least:
        raise ValueError(f"{name} is {number}; it must be at least {at_least}.")
    if at_most is not None and number > at_most:
        raise ValueError(f"{name} is {number}; it must be at most {at_most}.")
    return number


def check_integers(name: str, value: Any, count: int, *, at_most: int) -> list[int]:
    """`value` as a list of `count` integers from 0 to `at_most`.

    Args:
        name: Of the argument, for errors.
        value: A tensor of one dimension, or a sequence.
        count: How many: one for each sequence of a batch.
        at_most: The largest allowed.

    Raises:
        TypeError: If it is neither, or an entry is no integer.
        ValueError: If it has another shape or size, holds no values, or an entry is out of range.
    """
    if isinstance(value, torch.Tensor):
        if value.dim() != 1 or value.is_meta:
            raise ValueError(
                f"{name} is a tensor of shape {tuple(value.shape)} on {value.device}; it must have "
                f"one dimension and lie on a device that holds values."
            )
        value = cast(list[Any], value.tolist())
    if isinstance(value, str) or not isinstance(value, Sequence):
        raise TypeError(
            f"{name} is a {type(value).__name__}; it must be a tensor or a list of integers."
        )
    integers = [
        check_integer(f"an entry of {name}", x, at_least=0, at_most=at_most)
        for x in cast(Sequence[Any], value)
    ]
    if len(integers) != count:
        raise ValueError(
            f"{name} has {len(integers)} entries; it must have one for each sequence of the batch, "
            f"here {count}."
        )
    return integers


def _integer(value: Any) -> int | None:
    """`value` as an int; None if it is not an integer, or is a bool."""
    if isinstance(value, bool):
        return None
    if isinstance(value, (int, torch.SymInt)):
        # A SymInt stays symbolic: int() would fix the compiled graph to one length.
        return value  # pyright: ignore[reportReturnType]
    if isinstance(value, torch.Tensor) and value.dtype == torch.bool:
        return None
    try:
        return operator.index(value)
    except TypeError:
        return None


def check_number(
    name: str,
    value: Any,
    *,
    above: float | None = None,
    at_least: float | None = None,
    below: float | None = None,
    at_most: float | None = None,
    fix: str = "",
) -> float:
    """`value` as a float, if it is a finite number in the range.

    Args:
        name: Of the argument, for errors.
        value: The argument.
        above, at_least, below, at_most: Bounds of the range; None: no such bound.
        fix: Behind "it must be a number", such as ", or None for 1/√head_dim".

    Raises:
        TypeError: If it is not a number; True and False are none.
        ValueError: If it is infinite, NaN or out of range.
    """
    if isinstance(value, bool) or not isinstance(value, (int, float, Real)):
        raise TypeError(f"{name} is {value!r}; it must be a number{fix}.")
    try:
        number = float(value)
    except OverflowError:  # an integer above 1e308
        number = math.inf
    # Not math.isfinite, which no compiler can trace when the number is an input of the graph.
    if not -math.inf < number < math.inf:
        raise ValueError(f"{name} is {value}; it must be finite.")
    if (
        (above is not None and not number > above)
        or (at_least is not None and not number >= at_least)
        or (below is not None and not number < below)
        or (at_most is not None and not number <= at_most)
    ):
        bounds = {"above": above, "at least": at_least, "below": below, "at most": at_most}
        given = [f"{word} {bound}" for word, bound in bounds.items() if bound is not None]
        raise ValueError(f"{name} is {value}; it must be {' and '.join(given)}.")
    return number


def check_choice(name: str, value: object, allowed: tuple[str, ...]) -> None:
    """Refuse a value that is not one of `allowed`.

    Raises:
        ValueError: If it is another value.
    """
    if value not in allowed:
        raise ValueError(f"{name} is {value!r}; it must be one of {', '.join(map(repr, allowed))}.")


def check_tensor(name: str, value: object) -> None:
    """Refuse what is no tensor.

    Raises:
        TypeError: If it is anything else.
    """
    if not isinstance(value, torch.Tensor):
        raise TypeError(f"{name} is a {type(value).__name__}; it must be a tensor.")


def check_positions(name: str, positions: torch.Tensor) -> None:
    """Refuse what is not one integer per row.

    Raises:
        TypeError: If it is no tensor, or its dtype is not an integer.
        ValueError: If it does not have one dimension.
    """
    check_tensor(name, positions)
    dtype = positions.dtype
    if dtype == torch.bool or dtype.is_floating_point or dtype.is_complex:
        raise TypeError(f"{name} has dtype {dtype}; it must be an integer dtype.")
    if positions.dim() != 1:
        raise ValueError(f"{name} has shape {tuple(positions.shape)}; it must have one dimension.")


def check_dtype(dtype: object) -> None:
    """Refuse what is no dtype of PyTorch.

    Raises:
        TypeError: If it is anything else.
    """
    if not isinstance(dtype, torch.dtype):
        raise TypeError(f"dtype is {dtype!r}; it must be a dtype of torch, such as torch.float32.")


def check_float_dtype(dtype: object) -> None:
    """Refuse what is no floating-point dtype.

    Raises:
        TypeError: If it is anything else.
    """
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise TypeError(f"dtype is {dtype!r}; it must be a floating-point dtype of torch.")


def check_head_groups(num_heads: int, num_kv_heads: int | None) -> int:
    """H_kv, which is `num_heads` for None.

    Raises:
        TypeError: If a count is not an integer.
        ValueError: If a count is below 1 or H_kv does not divide H.
    """
    num_heads = check_integer("num_heads", num_heads, at_least=1)
    if num_kv_heads is None:
        return num_heads
    num_kv_heads = check_integer("num_kv_heads", num_kv_heads, at_least=1)
    if num_heads % num_kv_heads:
        raise ValueError(
            f"num_heads is {num_heads} and num_kv_heads {num_kv_heads}; num_kv_heads must divide "
            f"num_heads, so that each head of k and v serves equally many of q."
        )
    return num_kv_heads


def check_head_range(head_range: Sequence[int] | None, num_heads: int) -> tuple[int, int]:
    """Which heads of the whole attention the `num_heads` at hand are, as `(first, total)`.

    They are heads first to first + H − 1 of `total` heads, and have the offsets of these. None
    stands for (0, H): the heads at hand are all.

    Example:
        >>> check_head_range((6, 12), num_heads=4)  # heads 6 to 9 of 12
        (6, 12)
        >>> check_head_range(None, num_heads=4)
        (0, 4)

    Raises:
        TypeError: If it is neither None nor a pair of integers.
        ValueError: If `first` is negative, or the heads reach beyond `total`.
    """
    if head_range is None:
        return 0, num_heads
    if not isinstance(head_range, (tuple, list)) or len(head_range) != 2:
        raise TypeError(
            f"head_range is {head_range!r}; it must be a pair (first, total), such as (6, 12) for "
            f"the heads from 6 on of 12, or None."
        )
    first = check_integer("the first head of head_range", head_range[0], at_least=0)
    total = check_integer("the total of head_range", head_range[1])
    if first + num_heads > total:
        raise ValueError(
            f"head_range is ({first}, {total}) and there are {num_heads} heads; the heads "
            f"{first} to {first + num_heads - 1} must be among the {total} of the whole, so give "
            f"the first of these heads and the number of all."
        )
    return first, total


# The words that this library and its neighbours have for one thing, ours among them.
_SYNONYMS: tuple[frozenset[str], ...] = tuple(
    frozenset(words.split())
    for words in (
        "is_causal causal use_causal_mask",
        "scale softmax_scale sm_scale attn_scale qk_scale scaling",
        "dropout dropout_p dropout_rate dropout_prob attn_dropout attention_dropout attn_pdrop",
        "segment_lengths segment_length segment_sizes segment_size segment_lens segment_len",
        "dilation_rates dilation_rate dilation_ratios dilation_ratio dilations dilation "
        "dilated_ratios dilated_ratio",
        "embed_dim embedding_dim d_model dim hidden_size model_dim",
        "num_heads heads nhead nheads n_heads n_head num_attention_heads",
        "num_kv_heads kv_heads n_kv_heads num_key_value_heads",
        "layer_norm layernorm use_layer_norm subln sub_ln",
        "layer_norm_eps layernorm_eps eps",
        "gamma_init gamma init_gamma",
        "bias qkv_bias use_bias",
        "key_padding_mask padding_mask",
        "cu_seqlens cu_seqlens_q cu_seqlens_k cu_seq_q cu_seq_k",
        "backend attn_backend attn_implementation implementation impl kernel",
        "max_workspace_bytes workspace_bytes max_memory memory_limit",
    )
)


def check_names(
    owner: str,
    given: Iterable[str],
    known: Collection[str],
    elsewhere: Mapping[str, str] | None = None,
) -> None:
    """Refuse keyword arguments that `owner` does not have, naming the one that is meant.

    A function declares `**unknown: Never`, which type checkers refuse in every call, and passes
    `unknown` here first.

    Args:
        owner: The function or class that was called.
        given: Names that the call gave.
        known: Names that the owner has.
        elsewhere: What `owner` lacks and users give it all the same, such as
            `{"is_causal": "is passed to forward"}`.

    Raises:
        TypeError: If a name is not known.
    """
    elsewhere = elsewhere or {}
    for name in given:
        if name in known:
            continue
        raise TypeError(f"{owner} has no argument {name!r}; {_advice(name, known, elsewhere)}.")


def answers_names(elsewhere: Mapping[str, str]) -> Callable[[type[Config]], type[Config]]:
    """Let a dataclass of options answer unknown keywords as `check_names` does.

    Args:
        elsewhere: Answers for arguments of other functions, see `check_names`.
    """

    def decorate(config: type[Config]) -> type[Config]:
        init = config.__init__
        known = inspect.signature(config).parameters

        @wraps(init)
        def construct(self: Any, *args: Any, **options: Any) -> None:
            check_names(type(self).__name__, options, known, elsewhere)
            init(self, *args, **options)

        setattr(config, "__init__", construct)  # noqa: B010
        return config

    return decorate


def set_checked(config: object, **values: object) -> None:
    """Replace values of a frozen config by what the checks return, such as numpy's numbers by ints.

    Args:
        config: A frozen dataclass, in its `__post_init__`.
        **values: By the names of its fields.
    """
    for name, value in values.items():
        object.__setattr__(config, name, value)


def _advice(name: str, known: Collection[str], elsewhere: Mapping[str, str]) -> str:
    """What to write instead of an unknown name."""
    if name in elsewhere:
        return f"it {elsewhere[name]}"
    synonyms = sorted(next((words for words in _SYNONYMS if name in words), ()))
    for word in filter(known.__contains__, synonyms):
        return f"it is called {word}"
    for word in filter(elsewhere.__contains__, synonyms):
        return f"it is called {word}, and {elsewhere[word]}"
    return f"its arguments are {', '.join(known)}"
