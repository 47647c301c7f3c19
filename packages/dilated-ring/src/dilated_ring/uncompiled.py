"""Keep functions out of compiled graphs."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar

import torch

_Function = TypeVar("_Function", bound=Callable[..., object])


def uncompiled(function: _Function) -> _Function:
    """The function as `torch.compile` must leave it: messages are planned in Python."""

    @wraps(function)
    def call(*args: Any, **options: Any) -> Any:
        if not torch.compiler.is_compiling():
            return function(*args, **options)
        # Not when the package is imported: this would load the compiler.
        return torch.compiler.disable(function)(*args, **options)  # pyright: ignore

    return call  # pyright: ignore[reportReturnType]
