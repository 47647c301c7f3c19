"""One decoding step: append a token of each sequence to a cache, and attend from it.

B batch, H heads, H_kv heads of k and v, D head_dim.
"""

# pyright: reportPrivateUsage=false
# These functions are methods of DecodingCache in all but name.

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from dilated_core.backends.contract import AttentionInputs, check_output
from dilated_core.backends.registry import choose_backend
from dilated_core.decoding.cache import DecodingCache
from dilated_core.inputs import check_scale
from dilated_core.merge import AttentionOutput


def decode_step_with_lse(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cache: DecodingCache,
    *,
    scale: float | None = None,
    backend: str = "auto",
) -> AttentionOutput:
    """`decode_step` that also returns the log of the softmax denominators.

    Args, errors: As for `decode_step`.

    Returns:
        `out` `(B, 1, H, D)` in the dtype of q, and `lse` `(B, 1, H)`, natural logarithm, float32
        (float64 for float64 inputs); −inf where no branch selects the token.
    """
    scale = check_tokens(q, k, v, cache, 1, scale)
    counts = [1] * cache.batch_size
    cache._check_room(counts)
    inputs = AttentionInputs(
        q.device, q.dtype, cache.num_heads, cache.head_dim, num_kv_heads=cache.num_kv_heads
    )
    chosen: Any = choose_backend(backend, inputs, for_decoding=True)
    # A backend decodes one position. A run of sequences is a slice, so its part of the cache is a
    # view, which the backend writes to; a batch without sequences is one empty run.
    runs = list(cache._runs(counts)) or [(slice(0, 0), 0, 1)]
    with torch.no_grad(), without_autocast(q.device.type):
        results = [
            chosen.decode_forward(
                *(q[rows], k[rows], v[rows], cache.keys[rows], cache.values[rows], cache._layout),
                position=position,
                scale=scale,
            )
            for rows, position, _ in runs
        ]
        for (rows, _, _), (out, lse) in zip(runs, results, strict=True):
            check_output(chosen, out, lse, q[rows])
        cache._positions = [position + 1 for position in cache._positions]
        if len(results) == 1:
            return results[0]
        outs, lses = zip(*results, strict=True)
        return AttentionOutput(torch.cat(outs), torch.cat(lses))


def check_tokens(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cache: DecodingCache,
    n: int,
    scale: float | None,
) -> float:
    """Check n tokens of each sequence of a cache; returns the scale."""
    if not isinstance(cache, DecodingCache):
        raise TypeError(f"cache is a {type(cache).__name__}; it must be a DecodingCache.")
    cache._check("q", q, n, cache.num_heads)
    cache._check("k", k, n, cache.num_kv_heads)
    cache._check("v", v, n, cache.num_kv_heads)
    return check_scale(scale, cache.head_dim)


def without_autocast(device_type: str) -> AbstractContextManager[object]:
    """No autocast, which would compute the scores in half precision; a no-op on meta."""
    if torch.amp.is_autocast_available(device_type):
        return torch.autocast(device_type, enabled=False)
    return nullcontext()


def decode_step(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cache: DecodingCache,
    *,
    scale: float | None = None,
    backend: str = "auto",
) -> torch.Tensor:
    """Append one token of each sequence to the cache and attend from it.

    For each sequence this is the last row of `dilated_attention(..., is_causal=True)` over all of
    its tokens that the cache has seen. The token sees at most Σ ⌈w/r⌉ keys, so neither time nor
    memory grows with the context. For inference: it returns no gradient.

    A backend decodes one position at a time. So sequences at different positions are decoded in
    several calls: one for each run of neighbours in the batch that are at the same position.

    Args:
        q: `(B, 1, H, D)`, dtype and device of the cache.
        k, v: `(B, 1, H_kv, D)`, of the same token.
        cache: The cache of the tokens before. Changed in place, unless an error is raised.
        scale: Factor of the scores, the same at every step; 1/√D if None.
        backend: Name of a backend that can decode, such as "eager" or "triton", or "auto" for the
            best that can run here. A named backend is never replaced by another one.

    Returns:
        `(B, 1, H, D)` in the dtype of q; 0 where no branch selects the token.

    Raises:
        TypeError: If an argument has the wrong type or another dtype than the cache.
        ValueError: If shapes or devices do not fit, the cache would exceed its `max_seq_len`, the
            scale is not finite, q, k or v requires a gradient while gradients are enabled, the
            named backend does not exist or cannot decode these, or it returns another shape or
            dtype than the contract has.

    Example:
        >>> pattern = DilatedPattern([4, 16], [1, 2])
        >>> q, k, v = torch.randn(3, 1, 50, 2, 8).unbind()
        >>> cache = DecodingCache(pattern, batch_size=1, num_heads=2, head_dim=8)
        >>> outs = [decode_step(q[:, [t]], k[:, [t]], v[:, [t]], cache) for t in range(50)]
        >>> whole = dilated_attention(q, k, v, pattern, is_causal=True)
        >>> torch.testing.assert_close(torch.cat(outs, 1), whole)
    """
    return decode_step_with_lse(q, k, v, cache, scale=scale, backend=backend).out
