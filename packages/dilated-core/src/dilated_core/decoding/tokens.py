"""Several tokens at once: append them to a cache, and attend from each of them.

B batch, H heads, H_kv heads of k and v, D head_dim, w segment length, r dilation rate.

The tokens attend to one another by the plan of a span, as in a ring. To the tokens before them they
attend through the cache: in each branch whose segment began before the span, every new token of
that segment sees all rows that the cache holds of it.
"""

# pyright: reportPrivateUsage=false
# This function is a method of DecodingCache in all but name.

from __future__ import annotations

from collections.abc import Sequence

import torch

from dilated_core.backends.cache_layout import CacheLayout
from dilated_core.backends.contract import AttentionBackend, AttentionInputs, AttentionOptions
from dilated_core.backends.registry import choose_backend
from dilated_core.decoding.cache import DecodingCache
from dilated_core.decoding.step import check_tokens, without_autocast
from dilated_core.merge import AttentionOutput, fold_
from dilated_core.pattern.branches import kept_rows
from dilated_core.strips.attend import attend
from dilated_core.strips.plan import Span, plan_problems
from dilated_core.strips.view import is_batch_dense, viewable


def decode_tokens(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cache: DecodingCache,
    *,
    lengths: torch.Tensor | Sequence[int] | None = None,
    scale: float | None = None,
    backend: str = "auto",
) -> torch.Tensor:
    """Append n tokens of each sequence to the cache and attend from each, as n steps would.

    For a prompt, or for a part of one: with parts of bounded length, the memory for a prompt of any
    length is bounded. For inference: it returns no gradient.

    Args:
        q: `(B, n, H, D)`, dtype and device of the cache; any n.
        k, v: `(B, n, H_kv, D)`, of the same tokens.
        cache: The cache of the tokens before. Changed in place, unless an error is raised.
        lengths: B integers in [0, n]: of sequence b the first `lengths[b]` tokens are appended, and
            the others are padding. None: all n of each sequence.
        scale: Factor of the scores, the same at every step; 1/√D if None.
        backend: Name of a backend, or "auto" for the best that can run here. It need not be one
            that decodes; it must take k and v of another length than q.

    Returns:
        `(B, n, H, D)` in the dtype of q; 0 for padding and where no branch selects a token.

    Raises:
        TypeError: If an argument has the wrong type or another dtype than the cache.
        ValueError: If shapes or devices do not fit, a length is out of range, the cache would
            exceed its `max_seq_len`, the scale is not finite, q, k or v requires a gradient while
            gradients are enabled, or the named backend does not exist or cannot run these.

    Example:
        >>> pattern = DilatedPattern([4, 16], [1, 2])
        >>> q, k, v = torch.randn(3, 1, 50, 2, 8).unbind()
        >>> cache = DecodingCache(pattern, batch_size=1, num_heads=2, head_dim=8)
        >>> parts = [slice(0, 30), slice(30, 50)]
        >>> outs = [decode_tokens(q[:, part], k[:, part], v[:, part], cache) for part in parts]
        >>> whole = dilated_attention(q, k, v, pattern, is_causal=True)
        >>> torch.testing.assert_close(torch.cat(outs, 1), whole)
    """
    n = q.shape[1] if isinstance(q, torch.Tensor) and q.dim() == 4 else 0
    scale = check_tokens(q, k, v, cache, n, scale)
    counts = cache._check_lengths(lengths, n)
    cache._check_room(counts)
    H, H_kv, D = cache.num_heads, cache.num_kv_heads, cache.head_dim
    inputs = AttentionInputs(
        q.device, q.dtype, H, D, num_kv_heads=H_kv, seq_len=n, is_rectangular=True
    )
    chosen = choose_backend(backend, inputs)
    options = AttentionOptions(is_causal=False, scale=scale)
    out = q.new_zeros(q.shape)
    with torch.no_grad(), without_autocast(q.device.type):
        for rows, position, count in cache._runs(counts):
            if count and not q.is_meta:  # on meta there is nothing to compute
                q_, k_, v_ = (viewable(x[rows, :count]) for x in (q, k, v))
                memory = cache.keys[rows], cache.values[rows], cache._layout
                attended = _attend(q_, k_, v_, cache, memory, position, options, chosen)
                out[rows, :count] = attended
        cache._append(k, v, counts)
    return out


def _attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cache: DecodingCache,
    memory: tuple[torch.Tensor, torch.Tensor, CacheLayout],
    position: int,
    options: AttentionOptions,
    backend: AttentionBackend,
) -> torch.Tensor:
    """Attention of sequences at one position; their tokens are not yet in the cache.

    `memory` is their part of the cache: keys, values and layout.
    """
    span = Span(position, position + q.shape[1])
    problems = plan_problems(
        cache.pattern,
        queries=span,
        keys=span,
        seq_len=span.stop,
        num_heads=cache.num_heads,
        num_kv_heads=cache.num_kv_heads,
        head_range=cache.head_range,
        batch_size=len(q),
        is_causal=True,
        is_batch_dense=is_batch_dense(q, k, v),
    )
    into = attend(problems, q, k, v, options, backend=backend)
    # attend may return out in the dtype of q, and both as views of another shape.
    out, lse = into.out.to(into.lse.dtype).reshape(q.shape), into.lse.reshape(q.shape[:-1])
    keys, values, layout = memory
    for (w, r), sections in zip(layout.branches, layout.sections, strict=True):
        start = position % w  # index of the first new token in its segment
        stop = min(w, start + q.shape[1])
        for section in sections:
            row = kept_rows(start, r, section.offset)
            first = section.offset + row * r  # index of the first new token that the section keeps
            if row == 0 or first >= stop:
                continue
            kept = slice(first - start, stop - start, r)
            past_k, past_v = (section.view(x)[:, :, :row].transpose(1, 2) for x in (keys, values))
            heads = section.q_heads
            past = backend.forward(q[:, kept].index_select(2, heads), past_k, past_v, options)
            merged = AttentionOutput(
                out[:, kept].index_select(2, heads), lse[:, kept].index_select(2, heads)
            )
            fold_(merged, past)
            out[:, kept].index_copy_(2, heads, merged.out)
            lse[:, kept].index_copy_(2, heads, merged.lse)
    return out
