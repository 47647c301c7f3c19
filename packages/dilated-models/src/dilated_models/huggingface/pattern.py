"""Which pattern the layers of a transformers model have: that of a `with`, or of the config."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from dilated_core import DilatedAttentionConfig
from dilated_core.pattern.branches import HeadOffsets

_CHOSEN: ContextVar[DilatedAttentionConfig | None] = ContextVar("dilated_pattern", default=None)


@contextmanager
def dilated_pattern(
    segment_lengths: Sequence[int],
    dilation_rates: Sequence[int],
    *,
    head_offsets: HeadOffsets = "interleaved",
    backend: str = "auto",
) -> Generator[None]:
    """Give all models with `attn_implementation="dilated"` this pattern, inside the `with`.

    It goes before the pattern in a model's config. It holds for the current thread. A backward pass
    that recomputes layers (gradient checkpointing) must run inside the same `with`; on a GPU it
    runs in another thread, so there the pattern must be in the config.

    Args:
        segment_lengths: w of each branch, in tokens.
        dilation_rates: r of each branch.
        head_offsets: As for `dilated_core.DilatedPattern`.
        backend: As for `dilated_core.dilated_attention`.

    Raises:
        TypeError, ValueError: As `dilated_core.DilatedPattern`.

    Example::

        with dilated_pattern(segment_lengths=[2048, 8192], dilation_rates=[1, 4]):
            logits = model(tokens).logits
    """
    token = _CHOSEN.set(
        DilatedAttentionConfig(
            segment_lengths=segment_lengths,
            dilation_rates=dilation_rates,
            head_offsets=head_offsets,
            backend=backend,
        )
    )
    try:
        yield
    finally:
        _CHOSEN.reset(token)


def attention_of(config: Any) -> DilatedAttentionConfig:
    """The pattern and backend of a layer whose model has this transformers config.

    Raises:
        ValueError: If neither a `with dilated_pattern(...)` nor the config has a pattern.
        TypeError, ValueError: As `dilated_core.DilatedPattern`.
    """
    if (chosen := _CHOSEN.get()) is not None:
        return chosen
    lengths = getattr(config, "segment_lengths", None)
    rates = getattr(config, "dilation_rates", None)
    if lengths is None or rates is None:
        missing = "segment_lengths" if lengths is None else "dilation_rates"
        raise ValueError(
            f"{type(config).__name__} has no {missing}; attn_implementation='dilated' needs a "
            f"pattern, so set config.segment_lengths and config.dilation_rates, or call the model "
            f"inside `with dilated_pattern(segment_lengths=..., dilation_rates=...)`."
        )
    return DilatedAttentionConfig(
        segment_lengths=lengths,
        dilation_rates=rates,
        head_offsets=getattr(config, "head_offsets", "interleaved"),
    )
