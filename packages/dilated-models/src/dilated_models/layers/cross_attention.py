"""Dense attention from one sequence to another: the cross-attention of a decoder.

B batch, M rows of the decoder, N rows of the memory, H heads, H_kv heads of k and v, D head_dim.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from dilated_core import DilatedPattern, dilated_attention
from dilated_core.backends.contract import AttentionInputs, AttentionOptions
from dilated_core.backends.registry import choose_backend
from dilated_core.strips.attend import attend
from dilated_core.strips.plan import Span, plan_problems
from dilated_core.strips.view import is_batch_dense, viewable
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from dilated_models.layers.context_parallel import ContextParallel
from dilated_models.layers.key_history import KeyHistory

# One segment over a sequence of any length: dense attention.
_DENSE = DilatedPattern([2**48], [1])


class Memory(NamedTuple):
    """What a decoder attends to.

    Attributes:
        states: `(B, N, d_model)`; `(T, d_model)` with `cu_seqlens`. None for a text whose cache
            holds the keys and values of all of them.
        is_causal: Whether row i of the decoder sees the rows j ≤ i only; both have equally many.
        cu_seqlens: `(B + 1,)`, where the sequences begin that are packed in `states`.
        key_padding_mask: `(B, N)`, True for rows that nobody sees; not with `cu_seqlens`.
    """

    states: Tensor | None
    is_causal: bool
    cu_seqlens: Tensor | None = None
    key_padding_mask: Tensor | None = None


class CrossAttention(nn.Module):
    """Project, attend to all rows of a memory, project out.

    As in torchscale, no LayerNorm stands inside, the initial gain of values and output is 1, not γ,
    and neither queries nor keys are turned by their positions. Its scores are M·N per head: time
    grows with the product of both lengths, memory with their sum. Dropout of probabilities needs
    memory for all scores on the CPU, where PyTorch has no fused kernel with dropout.

    Args:
        d_model: Width of both sequences.
        nhead: H.
        num_kv_heads: H_kv; H if None.
        dropout: Probability of dropping an attention probability in training.
        backend: For causal attention, as in `dilated_core.dilated_attention`. Other attention runs
            PyTorch's `scaled_dot_product_attention`.
        device: Of the parameters.
        dtype: Of the parameters.
    """

    def __init__(
        self,
        d_model: int,
        nhead: int,
        *,
        num_kv_heads: int | None = None,
        dropout: float = 0.0,
        backend: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.head_dim, self.dropout, self.backend = d_model // nhead, dropout, backend
        kv_dim = self.head_dim * (num_kv_heads or nhead)
        self.q_proj = nn.Linear(d_model, d_model, device=device, dtype=dtype)
        self.k_proj = nn.Linear(d_model, kv_dim, device=device, dtype=dtype)
        self.v_proj = nn.Linear(d_model, kv_dim, device=device, dtype=dtype)
        self.out_proj = nn.Linear(d_model, d_model, device=device, dtype=dtype)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the weights anew: Xavier's uniform rule, with gain 1/√2 on q, k and v."""
        half = 1 / math.sqrt(2)
        gains = ((self.q_proj, half), (self.k_proj, half), (self.v_proj, half), (self.out_proj, 1))
        for projection, gain in gains:
            nn.init.xavier_uniform_(projection.weight, gain=gain)
            nn.init.zeros_(projection.bias)

    def project_memory(self, states: Tensor) -> tuple[Tensor, Tensor]:
        """`(…, d_model)` -> k and v `(…, H_kv, D)`."""
        k, v = (
            projection(states).unflatten(-1, (-1, self.head_dim))
            for projection in (self.k_proj, self.v_proj)
        )
        return k, v

    def forward(
        self,
        x: Tensor,
        memory: Memory,
        *,
        cu_seqlens: Tensor | None = None,
        cache: KeyHistory | None = None,
        counts: Sequence[int] | None = None,
        context_parallel: ContextParallel | None = None,
    ) -> Tensor:
        """Attend from `x` to the memory.

        Args:
            x: `(B, M, d_model)`; `(T, d_model)` with `cu_seqlens`.
            memory: What `x` sees.
            cu_seqlens: `(B + 1,)`, where the sequences begin that are packed in `x`.
            cache: Keys and values of the memory. With `memory.states`, those of its rows are
                appended first. For inference: the result has no gradient.
            counts: With a cache, how many rows of each sequence of `x` are not padding; None: all.
            context_parallel: If `x` and the memory are one rank's shard; causal only.

        Returns:
            The shape of `x`; a row that sees nothing gets the output projection of zeros.
        """
        q = self.q_proj(x).unflatten(-1, (-1, self.head_dim))
        if cache is not None:
            out = self._decode(q, memory, cache, counts).to(x.dtype)
            return self.out_proj(out.flatten(-2))
        assert memory.states is not None  # only a cache can take its place
        k, v = self.project_memory(memory.states)
        dropout_p = self.dropout if self.training else 0.0
        if context_parallel is not None:
            out = context_parallel.attend(
                *(q, k, v, _DENSE),
                is_causal=memory.is_causal,
                cu_seqlens=cu_seqlens,
                backend=self.backend,
            )
        elif memory.is_causal:
            out = dilated_attention(
                *(q, k, v, _DENSE),
                is_causal=True,
                dropout_p=dropout_p,
                key_padding_mask=memory.key_padding_mask,
                cu_seqlens=cu_seqlens,
                backend=self.backend,
            )
        elif cu_seqlens is None:
            out = dense_attention(q, k, v, memory.key_padding_mask, dropout_p=dropout_p)
        else:
            assert memory.cu_seqlens is not None  # both are packed, or none
            out = _of_sequences(q, k, v, cu_seqlens, memory.cu_seqlens, dropout_p)
        return self.out_proj(out.flatten(-2))

    def _decode(
        self, q: Tensor, memory: Memory, cache: KeyHistory, counts: Sequence[int] | None
    ) -> Tensor:
        q = q.to(cache.keys.dtype)
        if memory.states is not None:
            k, v = (x.to(q.dtype) for x in self.project_memory(memory.states))
            out = torch.zeros_like(q)
            for texts, start, end in cache.append(k, v, counts):
                out[texts, : end - start] = _last_rows(
                    q[texts, : end - start],
                    *(cache.keys[texts, :end], cache.values[texts, :end]),
                    self.backend,
                )
            return out
        longest = max(cache.positions)
        k, v = cache.keys[:, :longest], cache.values[:, :longest]
        if min(cache.positions) == longest:
            return dense_attention(q, k, v)
        lengths = torch.tensor(cache.positions, device=q.device)
        hidden = torch.arange(longest, device=q.device) >= lengths[:, None]
        return dense_attention(q, k, v, hidden)

    def extra_repr(self) -> str:
        """The options that are no submodules, if not the default."""
        shown = {"dropout": (self.dropout, 0.0), "backend": (self.backend, "auto")}
        return ", ".join(f"{name}={x!r}" for name, (x, default) in shown.items() if x != default)


def dense_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_padding_mask: Tensor | None = None,
    *,
    dropout_p: float = 0.0,
) -> Tensor:
    """PyTorch's attention of q `(B, M, H, D)` to k and v `(B, N, H_kv, D)`.

    Args:
        q, k, v: Of one dtype and device.
        key_padding_mask: `(B, N)`, True for keys that nobody sees, whatever they hold.
        dropout_p: Probability of dropping an attention probability.

    Returns:
        `(B, M, H, D)`; 0, with gradient 0, for a sequence without keys.
    """
    groups = q.shape[2] // k.shape[2]
    visible = None
    if key_padding_mask is not None:
        # A masked row may hold NaN, and 0 · NaN is NaN.
        k, v = (x.masked_fill(key_padding_mask[..., None, None], 0) for x in (k, v))
        # A softmax over no key may be NaN. A sequence without keys attends to zeros instead.
        visible = (~key_padding_mask | key_padding_mask.all(-1, keepdim=True))[:, None, None]
    # PyTorch's own grouped queries have no CPU kernel of linear memory.
    k, v = (x.repeat_interleave(groups, 2) if groups > 1 else x for x in (k, v))
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    out = scaled_dot_product_attention(q, k, v, attn_mask=visible, dropout_p=dropout_p)
    return out.transpose(1, 2)


def _of_sequences(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, memory_bounds: Tensor, dropout_p: float
) -> Tensor:
    """Attention of packed q `(T, H, D)`, each sequence to its own packed keys."""
    outs: list[Tensor] = []
    rows, memory_rows = (pairwise(_integers(x)) for x in (cu_seqlens, memory_bounds))
    for (a, b), (c, d) in zip(rows, memory_rows, strict=True):
        part = (q[None, a:b], k[None, c:d], v[None, c:d])
        is_empty = a == b or c == d
        outs.append(
            torch.zeros_like(q[a:b]) if is_empty else dense_attention(*part, dropout_p=dropout_p)[0]
        )
    return torch.cat(outs)


def _integers(bounds: Tensor) -> list[int]:
    return [int(bound) for bound in bounds.cpu()]


def _last_rows(q: Tensor, k: Tensor, v: Tensor, backend: str) -> Tensor:
    """Causal attention of the last n of N rows: q `(B, n, H, D)`, k and v `(B, N, H_kv, D)`."""
    (B, n, H, D), (N, H_kv) = q.shape, k.shape[1:3]
    if q.is_meta:
        return q
    inputs = AttentionInputs(
        q.device, q.dtype, H, D, num_kv_heads=H_kv, seq_len=n, is_rectangular=True
    )
    q, k, v = (viewable(x) for x in (q, k, v))
    problems = plan_problems(
        _DENSE,
        queries=Span(N - n, N),
        keys=Span(0, N),
        seq_len=N,
        num_heads=H,
        num_kv_heads=H_kv,
        batch_size=B,
        is_causal=True,
        is_batch_dense=is_batch_dense(q, k, v),
    )
    options = AttentionOptions(is_causal=True, scale=D**-0.5)
    with torch.autocast(q.device.type, enabled=False):
        result = attend(problems, q, k, v, options, backend=choose_backend(backend, inputs))
    return result.out.to(q.dtype).reshape(q.shape)
