"""Find backends by name, choose one, and explain why the others were not chosen."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import lru_cache
from importlib.metadata import EntryPoint, entry_points
from threading import Lock, RLock
from typing import Any, NamedTuple

import torch

from dilated_core.backends.contract import (
    CONTRACT_VERSION,
    AttentionBackend,
    AttentionInputs,
    BoundedWorkspaceBackend,
    DecodingBackend,
    RankedBackend,
)
from dilated_core.backends.eager import EagerBackend
from dilated_core.backends.sdpa import SdpaBackend
from dilated_core.checks import check_dtype, check_integer

ENTRY_POINT_GROUP = "dilated.backends"

# Names of the family, so that the error for one that is not installed names its package.
_PROVIDERS = dict.fromkeys(
    ("triton", "flash4", "flash3", "flash2", "cudnn", "xformers", "efficient", "flex"),
    "dilated-kernels",
)

Ranking = Callable[[AttentionInputs], Mapping[str, tuple[int, str]]]
"""Maps inputs to ranks by backend name, each with its origin; it may leave backends out."""

# Dictionaries are replaced and never changed, so that threads read them without a lock.
_registered: dict[str, AttentionBackend] = {}
_broken: dict[str, str] = {}
_history: dict[str, tuple[AttentionBackend, ...]] = {}  # all that were ever registered, by name
_ranking: Ranking | None = None
_generation = 0  # counts the changes of the three above; a choice is remembered for one of them
_changing = Lock()  # never held during an import: another thread's import may register a backend

_entry_points_read = False
_is_loading = False
_loading = RLock()  # held while the packages are imported, so that other threads wait for them


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
    global _registered, _history
    with _changing:
        if backend.name in _registered or backend.name == "auto":
            raise ValueError(f"backend name {backend.name!r} is taken; choose another name.")
        _registered = {**_registered, backend.name: backend}
        _history = {**_history, backend.name: (*_history.get(backend.name, ()), backend)}
        forget_choices()


def unregister_backend(name: str) -> None:
    """Take back a `register_backend`.

    Raises:
        ValueError: If no backend has that name.
    """
    global _registered
    with _changing:
        if name not in _registered:
            raise ValueError(
                f"no backend {name!r} is registered, so there is nothing to take back."
            )
        _registered = {other: _registered[other] for other in _registered if other != name}
        forget_choices()


def use_ranking(ranking: Ranking | None) -> None:
    """Rank backends by `ranking`, such as one that was measured on this machine; undo with None.

    The ranking changes which backend `"auto"` tries first, not which backends can run. A backend
    that the ranking leaves out keeps its own rank.

    Change the ranking between training steps. Backward runs the backend of forward, but activation
    checkpointing calls attention again, which chooses anew: with dropout, the masks then differ.
    """
    global _ranking
    with _changing:
        _ranking = ranking
        forget_choices()


def forget_choices() -> None:
    """Discard the remembered choices, after a change of the backends or of the ranking.

    Another thread may be choosing from the old state. Its choice is stored under the old
    generation, where no later call finds it. A cleared cache would still receive this choice.
    """
    global _generation
    _generation += 1


def own_rank(backend: AttentionBackend, inputs: AttentionInputs) -> tuple[int, str]:
    """How `backend` ranks itself for these inputs, and the origin of the rank ("" if constant)."""
    if isinstance(backend, RankedBackend):
        return backend.priority_for(inputs)
    return backend.priority, ""


def get_backend(name: str) -> AttentionBackend:
    """The backend registered as `name`.

    Raises:
        ValueError: If there is none; the message says what to install or what there is.
    """
    # Hot path: most names were looked up before. It takes no lock.
    if (backend := _registered.get(name)) is not None:
        return backend
    _read_entry_points()
    if (backend := _registered.get(name)) is not None:
        return backend
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


def record_choice(backend: AttentionBackend) -> tuple[str, int]:
    """A registered backend as its name and how many had that name before it: for an operator.

    Backward must run the backend of forward, even if it is taken back or replaced in between.
    """
    return backend.name, _history[backend.name].index(backend)


def recorded_backend(record: tuple[str, int]) -> AttentionBackend:
    """The backend that `record_choice` recorded.

    A graph compiled in another process may name a backend that is not loaded yet.

    Raises:
        ValueError: If there is none.
    """
    name, number = record
    if number >= len(_history.get(name, ())):
        get_backend(name)
    backends = _history.get(name, ())
    return backends[number] if number < len(backends) else get_backend(name)


def available_backends() -> tuple[str, ...]:
    """Names of the installed backends, highest priority first.

    For particular inputs `"auto"` may try them in another order, which `explain_backends` shows.

    Example:
        >>> "eager" in available_backends()  # it runs on every device, in every dtype
        True
    """
    _read_entry_points()
    backends = sorted(_registered.items(), key=lambda item: -item[1].priority)
    return tuple(name for name, _ in backends)


def choose_backend(
    name: str, inputs: AttentionInputs, *, for_decoding: bool = False
) -> AttentionBackend:
    """The backend for these inputs: the named one, or for `"auto"` the best that can run.

    `for_decoding`: among those with `decode_forward`.

    Raises:
        ValueError: If the named backend does not exist or cannot run, with all its reasons. A named
            backend is never replaced by another one.
    """
    return _choose_backend(name, inputs, for_decoding, _generation)


@lru_cache(maxsize=256)  # every layer of a training step repeats the same choice
def _choose_backend(
    name: str, inputs: AttentionInputs, for_decoding: bool, generation: int
) -> AttentionBackend:
    """`choose_backend`, remembered as long as `generation` is the latest."""
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

    The lines are in the order in which `"auto"` tries the backends for these inputs. The line of a
    backend that ranks itself by the inputs ends with its rank and the origin of the rank.

    Args:
        device: Where q, k and v would be.
        dtype: Their dtype.
        num_heads: H.
        head_dim: D.
        **options: Other attributes of `AttentionInputs`, such as `seq_len`, `dropout_p` and
            `has_key_padding_mask`.

    Raises:
        TypeError: If an option is unknown, `dtype` no dtype or a count no integer.
        ValueError: If a count is below 1.

    Example:
        >>> print(explain_backends(dtype=torch.int64))  # doctest: +ELLIPSIS
        for int64 on cpu, 8 heads of 64:...
          sdpa      cannot run: the dtype is int64; it takes float64, float32, bfloat16, float16.
          eager     cannot run: the dtype is int64; it takes any floating dtype...
    """
    check_dtype(dtype)
    num_heads = check_integer("num_heads", num_heads, at_least=1)
    head_dim = check_integer("head_dim", head_dim, at_least=1)
    return _explain(AttentionInputs(torch.device(device), dtype, num_heads, head_dim, **options))


def _why_not(backend: AttentionBackend, inputs: AttentionInputs, for_decoding: bool) -> list[str]:
    reasons = backend.why_not(inputs)
    if for_decoding and not isinstance(backend, DecodingBackend):
        return [*reasons, "it cannot decode."]
    limit = inputs.max_workspace_bytes
    # One reason is enough: a backend may have its own words for it.
    if limit is not None and not reasons and not isinstance(backend, BoundedWorkspaceBackend):
        return [f"max_workspace_bytes is {limit}; it does not report how much memory it allocates."]
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
    ranking = _ranking  # read once: another thread may take the ranking back
    overruling: Mapping[str, tuple[int, str]] = {} if ranking is None else ranking(inputs)
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
        if reasons := _why_not(backend, inputs, False):
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
    """Load the backends of installed packages, once, when a call first needs them.

    Other threads wait until all are loaded, since an earlier look-up would miss backends. A look-up
    by an import, in the loading thread itself, finds the backends loaded so far.
    """
    global _entry_points_read, _is_loading
    if _entry_points_read:
        return
    with _loading:
        if _entry_points_read or _is_loading:
            return
        _is_loading = True
        try:
            for entry_point in entry_points(group=ENTRY_POINT_GROUP):
                _load(entry_point)
            _entry_points_read = True
        finally:
            _is_loading = False


def _load(entry_point: EntryPoint) -> None:
    global _broken
    try:
        backend = entry_point.load()
        # An import may have registered the backend itself.
        if _registered.get(getattr(backend, "name", "")) is not backend:
            register_backend(backend)
    except Exception as error:
        # "auto" must work whatever else is installed. explain_backends shows the reason, and so
        # does the error for a call that names this backend.
        _broken = {**_broken, entry_point.name: f"{type(error).__name__}: {error}"}


register_backend(EagerBackend())
register_backend(SdpaBackend())
