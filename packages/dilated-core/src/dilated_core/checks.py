"""Checks of single arguments, one per kind of value; each error gives the value, rule and fix."""

from __future__ import annotations

import math
from typing import Any

import torch


def check_bool(name: str, value: object) -> bool:
    """`value` itself, if it is a bool. A string such as "False" would count as true.

    Raises:
        TypeError: If it is anything else.
    """
    if not isinstance(value, bool):
        raise TypeError(f"{name} is {value!r}; it must be True or False.")
    return value


def check_integer(
    name: str, value: Any, *, at_least: int | None = None, at_most: int | None = None
) -> int:
    """`value` as an int, if it is an integer (of Python, numpy or a compiler) in the range.

    Raises:
        TypeError: If it is not an integer; True and False are none.
        ValueError: If it is out of range.
    """
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise TypeError(f"{name} is {value!r}; it must be an integer.")
    # A SymInt stays symbolic: int() would fix the compiled graph to one length.
    number = value if isinstance(value, torch.SymInt) else int(value.__index__())
    if at_least is not None and number < at_least:
        raise ValueError(f"{name} is {number}; it must be at least {at_least}.")
    if at_most is not None and number > at_most:
        raise ValueError(f"{name} is {number}; it must be at most {at_most}.")
    return number  # pyright: ignore[reportReturnType]


def check_number(name: str, value: Any, *, above: float | None = None, fix: str = "") -> float:
    """`value` as a float, if it is a finite number.

    Args:
        name: Of the argument, for errors.
        value: The argument.
        above: A bound that the number must exceed; None: no bound.
        fix: Behind "it must be a number", such as ", or None for 1/√head_dim".

    Raises:
        TypeError: If it is not a number; True and False are none.
        ValueError: If it is infinite, NaN or out of range.
    """
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} is {value!r}; it must be a number{fix}.")
    if not math.isfinite(value):
        raise ValueError(f"{name} is {value}; it must be finite.")
    if above is not None and not value > above:
        raise ValueError(f"{name} is {value}; it must be above {above}.")
    return float(value)


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
    check_integer("num_heads", num_heads, at_least=1)
    if num_kv_heads is None:
        return num_heads
    check_integer("num_kv_heads", num_kv_heads, at_least=1)
    if num_heads % num_kv_heads:
        raise ValueError(
            f"num_heads is {num_heads} and num_kv_heads {num_kv_heads}; num_kv_heads must divide "
            f"num_heads, so that each head of k and v serves equally many of q."
        )
    return num_kv_heads
