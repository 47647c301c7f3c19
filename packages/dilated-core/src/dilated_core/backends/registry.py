"""Find backends by name, choose one, and say why the others were not chosen."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import lru_cache
from importlib.metadata import EntryPoint, entry_points
from typing import Any, NamedTuple

import torch

from dilated_core.backends.contract import CONTRACT_VERSION, AttentionBackend, AttentionInputs
from dilated_core.backends.eager import EagerBackend
from dilated_core.backends.sdpa import SdpaBackend

ENTRY_POINT_GROUP = "dilated.backends"

# Names of the family, so that asking for one that is not installed can say what to install.
_PROVIDERS = dict.fromkeys(
    ("triton", "flash4", "flash3", "flash2", "cudnn", "xformers", "efficient", "flex"),
    "dilated-kernels",
)

Ranking = Callable[[AttentionInputs], Mapping[str, tuple[int, str]]]
"""From inputs to ranks, each with where it comes from, of the backends it knows of, by name."""

_registered: dict[str, AttentionBackend] = {}
_broken: dict[str, str] = {}
_entry_points_read = False
_ranking: Ranking | None = None


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


def use_ranking(ranking: Ranking | None) -> None:
    """Rank backends by `ranking`, such as one that was measured on this machine; undo with None.

    It changes which backend `"auto"` tries first, not which ones can run. For a backend that it
    leaves out, the backend's own rank holds.
    """
    global _ranking
    _ranking = ranking
    choose_backend.cache_clear()


def own_rank(backend: AttentionBackend, inputs: AttentionInputs) -> tuple[int, str]:
    """How `backend` ranks itself for these inputs, and where that comes from ("" if constant)."""
    priority_for: Callable[[AttentionInputs], tuple[int, str]] | None = getattr(
        backend, "priority_for", None
    )
    return (backend.priority, "") if priority_for is None else priority_for(inputs)


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
    """Names of the installed backends, the one of highest priority coming first.

    For particular inputs `"auto"` may try them in another order, which `explain_backends` shows.

    Example:
        >>> "eager" in available_backends()  # it runs on every device, in every dtype
        True
    """
    _read_entry_points()
    return tuple(sorted(_registered, key=lambda name: -_registered[name].priority))


@lru_cache(maxsize=256)  # a training step asks the same thing for each layer
def choose_backend(
    name: str, inputs: AttentionInputs, *, for_decoding: bool = False
) -> AttentionBackend:
    """The backend for these inputs: the named one, or for `"auto"` the best that can run.

    `for_decoding`: among those with `decode_forward`.

    Raises:
        ValueError: If the named backend does not exist or cannot run, with all its reasons. A named
            backend is never replaced by another one.
    """
    if name != "auto":
        backend = get_backend(name)
        if reasons := _why_not(backend, inputs, for_decoding):
            raise ValueError(
                f"backend {name!r} cannot run {_describe(inputs)}: {' '.join(reasons)} "
                f"Use backend='auto' to take one that can."
            )
        return backend
    for candidate in _in_order(inputs):
        if candidate.rank >= 0 and not _why_not(candidate.backend, inputs, for_decoding):
            return candidate.backend
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

    The lines are in the order in which `"auto"` tries the backends for these inputs. A backend that
    ranks itself by the inputs has its rank and where that comes from behind its line.

    Args:
        device: Where q, k and v would be.
        dtype: Their dtype.
        num_heads: H.
        head_dim: D.
        **options: Other attributes of `AttentionInputs`, such as `seq_len`, `dropout_p` and
            `has_key_padding_mask`.

    Raises:
        TypeError: If an option is unknown.

    Example:
        >>> print(explain_backends(dtype=torch.int64))  # doctest: +ELLIPSIS
        for int64 on cpu, 8 heads of 64:...
          sdpa      cannot run: the dtype is int64; it takes float64, float32, bfloat16, float16.
          eager     cannot run: the dtype is int64; it takes any floating dtype...
    """
    return _explain(AttentionInputs(torch.device(device), dtype, num_heads, head_dim, **options))


def _why_not(backend: AttentionBackend, inputs: AttentionInputs, for_decoding: bool) -> list[str]:
    reasons = backend.why_not(inputs)
    if for_decoding and not hasattr(backend, "decode_forward"):
        return [*reasons, "it has no decode kernel."]
    return reasons


def _describe(inputs: AttentionInputs) -> str:
    dtype = str(inputs.dtype).removeprefix("torch.")
    return f"{dtype} on {inputs.device}, {inputs.num_heads} heads of {inputs.head_dim}"


class _Candidate(NamedTuple):
    rank: int
    origin: str
    backend: AttentionBackend


def _in_order(inputs: AttentionInputs) -> list[_Candidate]:
    """Every installed backend, in the order in which `"auto"` tries them."""
    _read_entry_points()
    overruling: Mapping[str, tuple[int, str]] = {} if _ranking is None else _ranking(inputs)
    candidates: list[_Candidate] = []
    for name, backend in _registered.items():
        rank, origin = overruling.get(name) or own_rank(backend, inputs)
        candidates.append(_Candidate(rank, origin, backend))
    return sorted(candidates, key=lambda candidate: -candidate.rank)


def _explain(inputs: AttentionInputs) -> str:
    length = "" if inputs.seq_len is None else f", {inputs.seq_len} positions"
    lines = [f"for {_describe(inputs)}{length}:"]
    chosen = False
    for rank, origin, backend in _in_order(inputs):
        because = f" (rank {rank}: {origin})" if origin else ""
        if reasons := backend.why_not(inputs):
            verdict = f"cannot run: {' '.join(reasons)}"
        elif rank < 0:
            verdict = f"only by name: {origin or f'its priority is {rank}'}"
        elif chosen:
            verdict = f"can run{because}"
        else:
            verdict, chosen = f"can run, and is what 'auto' takes{because}", True
        lines.append(f"  {backend.name:<9} {verdict}")
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
