"""Find backends by name, choose one, and say why the others were not chosen."""

from __future__ import annotations

from functools import lru_cache
from importlib.metadata import EntryPoint, entry_points
from typing import Any

import torch

from dilated_core.backend import CONTRACT_VERSION, AttentionBackend, AttentionInputs
from dilated_core.eager import EagerBackend
from dilated_core.sdpa import SdpaBackend

ENTRY_POINT_GROUP = "dilated.backends"

# Names of the family, so that asking for one that is not installed can say what to install.
_PROVIDERS = dict.fromkeys(
    ("triton", "flash2", "flash3", "flash4", "xformers", "flex"), "dilated-kernels"
)

_registered: dict[str, AttentionBackend] = {}
_broken: dict[str, str] = {}
_entry_points_read = False


def register_backend(backend: AttentionBackend) -> None:
    """Make `backend` available under its name.

    Packages register through the entry-point group `dilated.backends`, whose entries name an
    object like the one given here; this function is for a backend made at run time.

    Raises:
        TypeError: If it lacks a part of the `AttentionBackend` protocol.
        ValueError: If the name is taken, or it was written for another contract.
    """
    if not isinstance(backend, AttentionBackend):
        raise TypeError(
            f"{backend!r} is no attention backend; it needs name, priority, contract, why_not, "
            f"forward and backward (see dilated_core.AttentionBackend)."
        )
    if backend.contract != CONTRACT_VERSION:
        raise ValueError(
            f"backend {backend.name!r} was written for backend contract {backend.contract}, and "
            f"this dilated-core has {CONTRACT_VERSION}; update the older package of the two."
        )
    if backend.name in _registered or backend.name == "auto":
        raise ValueError(f"backend name {backend.name!r} is taken; choose another name.")
    _registered[backend.name] = backend
    choose_backend.cache_clear()


def unregister_backend(name: str) -> None:
    """Take back a `register_backend`.

    Raises:
        ValueError: If no backend has that name.
    """
    if name not in _registered:
        raise ValueError(f"no backend {name!r} is registered, so there is nothing to take back.")
    del _registered[name]
    choose_backend.cache_clear()


def get_backend(name: str) -> AttentionBackend:
    """The backend registered as `name`.

    Raises:
        ValueError: If there is none; the message says what to install or what there is.
    """
    # A call that has come this far has been here before, so the look-up must cost nothing.
    if (backend := _registered.get(name)) is not None:
        return backend
    _read_entry_points()
    if name in _registered:
        return _registered[name]
    if name in _broken:
        raise ValueError(f"backend {name!r} is installed but cannot be loaded: {_broken[name]}")
    if name in _PROVIDERS:
        raise ValueError(
            f"backend {name!r} is not installed; it comes with the package {_PROVIDERS[name]}."
        )
    raise ValueError(
        f"backend is {name!r}; it must be 'auto' or one of "
        f"{', '.join(map(repr, available_backends()))}."
    )


def available_backends() -> tuple[str, ...]:
    """Names of the installed backends, the one that `"auto"` tries first coming first.

    Example:
        >>> available_backends()[-1]  # runs on every device and dtype
        'eager'
    """
    _read_entry_points()
    return tuple(sorted(_registered, key=lambda name: -_registered[name].priority))


@lru_cache(maxsize=256)  # a training step asks the same thing for each layer
def choose_backend(name: str, inputs: AttentionInputs) -> AttentionBackend:
    """The backend for these inputs: the named one, or for `"auto"` the best that can run.

    Raises:
        ValueError: If the named backend does not exist or cannot run, with all its reasons. A named
            backend is never replaced by another one.
    """
    if name != "auto":
        backend = get_backend(name)
        if reasons := backend.why_not(inputs):
            raise ValueError(
                f"backend {name!r} cannot run {_describe(inputs)}: {' '.join(reasons)} "
                f"Use backend='auto' to take one that can."
            )
        return backend
    for candidate in available_backends():
        if not _registered[candidate].why_not(inputs):
            return _registered[candidate]
    raise ValueError(f"no backend can run these inputs.\n{_explain(inputs)}")


def explain_backends(
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    num_heads: int = 8,
    head_dim: int = 64,
    **options: Any,
) -> str:
    """Which backend `"auto"` takes for such inputs, and why not the others: one line each.

    Args:
        device: Where q, k and v would be.
        dtype: Their dtype.
        num_heads: H.
        head_dim: D.
        **options: Other attributes of `AttentionInputs`, such as `dropout_p` and
            `has_key_padding_mask`.

    Raises:
        TypeError: If an option is unknown.

    Example:
        >>> print(explain_backends(dtype=torch.int64))
        for int64 on cpu, 8 heads of 64:
          sdpa      cannot run: the dtype is int64; it takes float64, float32, bfloat16, float16.
          eager     cannot run: the dtype is int64; it takes any floating dtype.
    """
    return _explain(AttentionInputs(torch.device(device), dtype, num_heads, head_dim, **options))


def _describe(inputs: AttentionInputs) -> str:
    dtype = str(inputs.dtype).removeprefix("torch.")
    return f"{dtype} on {inputs.device}, {inputs.num_heads} heads of {inputs.head_dim}"


def _explain(inputs: AttentionInputs) -> str:
    lines = [f"for {_describe(inputs)}:"]
    chosen = False
    for name in available_backends():
        if reasons := _registered[name].why_not(inputs):
            verdict = f"cannot run: {' '.join(reasons)}"
        elif chosen:
            verdict = "can run"
        else:
            verdict, chosen = "can run, and is what 'auto' takes", True
        lines.append(f"  {name:<9} {verdict}")
    lines += [f"  {name:<9} cannot be loaded: {reason}" for name, reason in sorted(_broken.items())]
    lines += [
        f"  {name:<9} not installed: comes with the package {provider}"
        for name, provider in _PROVIDERS.items()
        if name not in _registered and name not in _broken and chosen
    ]
    return "\n".join(lines)


def _read_entry_points() -> None:
    """Load the backends of installed packages, once, when somebody first asks for a choice."""
    global _entry_points_read
    if _entry_points_read:
        return
    _entry_points_read = True
    for entry_point in entry_points(group=ENTRY_POINT_GROUP):
        _load(entry_point)


def _load(entry_point: EntryPoint) -> None:
    try:
        register_backend(entry_point.load())
    except (ImportError, AttributeError, TypeError, ValueError) as error:
        # "auto" must work whatever else is installed; the reason is kept for explain_backends and
        # for whoever asks for this backend by name.
        _broken[entry_point.name] = f"{type(error).__name__}: {error}"


register_backend(EagerBackend())
register_backend(SdpaBackend())
