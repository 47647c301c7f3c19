"""Dilated attention with the projections of a transformer layer."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, overload

import torch
from torch import nn

from dilated_core.modules.config import MultiheadConfig
from dilated_core.modules.dilated import DilatedAttention
from dilated_core.pattern.branches import HeadOffsets, Padding


class MultiheadDilatedAttention(nn.Module):
    """Multi-head self-attention with dilated attention inside, as MAGNETO arranges it.

    Query, key and value projections, dilated attention, LayerNorm on its output, output projection.
    Initialised as in MAGNETO (arXiv 2210.06423): xavier-uniform, with gain 1/√2 on q and k, γ/√2 on
    v and γ on the output; biases 0. It stands in for `nn.MultiheadAttention(batch_first=True)`, in
    `nn.TransformerEncoderLayer` too.

    Args:
        embed_dim: E, the width of inputs and outputs; a multiple of `num_heads`.
        num_heads: H.
        segment_lengths: w of each branch, in positions.
        dilation_rates: r of each branch, in positions.
        dropout: Probability of dropping each attention probability in training mode.
        bias: Whether the projections add a bias.
        layer_norm: Whether to normalise the attention's output before the output projection.
        layer_norm_eps: Epsilon of that LayerNorm.
        gamma_init: γ, the gain of the initial v and output projections.
        num_kv_heads: Heads of keys and values, which divide `num_heads`; `num_heads` if None.
        head_offsets: `"interleaved"` or `"blocked"`, see `DilatedPattern`.
        padding: `"masked"` or `"attended"`, see `DilatedPattern`.
        scale: Factor of the scores; 1/√head_dim if None.
        max_workspace_bytes: Limit of what attention allocates, see `dilated_attention`.
        backend: `"auto"` or the name of a backend.
        device, dtype: Of the parameters.

    Raises:
        TypeError, ValueError: As `MultiheadConfig` and `DilatedPattern` do.

    Example:
        >>> mha = MultiheadDilatedAttention(
        ...     embed_dim=32, num_heads=4, segment_lengths=[8, 32], dilation_rates=[1, 4]
        ... )
        >>> x = torch.randn(2, 50, 32)
        >>> mha(x, x, x, is_causal=True).shape
        torch.Size([2, 50, 32])
    """

    # nn.TransformerEncoderLayer looks at these to decide on its fused path for inference, which
    # would go round this module; they say "not for me".
    batch_first = True
    in_proj_bias = None
    _qkv_same_embed_dim = False

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        *,
        segment_lengths: Sequence[int],
        dilation_rates: Sequence[int],
        dropout: float = 0.0,
        bias: bool = True,
        layer_norm: bool = True,
        layer_norm_eps: float = 1e-5,
        gamma_init: float = 1.0,
        num_kv_heads: int | None = None,
        head_offsets: HeadOffsets = "interleaved",
        padding: Padding = "masked",
        scale: float | None = None,
        max_workspace_bytes: int | None = None,
        backend: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.config = MultiheadConfig(
            embed_dim=embed_dim,
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            bias=bias,
            layer_norm=layer_norm,
            layer_norm_eps=layer_norm_eps,
            gamma_init=gamma_init,
            device=device,
            dtype=dtype,
        )
        self.embed_dim, self.num_heads = embed_dim, num_heads
        self.head_dim = embed_dim // num_heads
        self.attention = DilatedAttention(
            segment_lengths,
            dilation_rates,
            head_offsets=head_offsets,
            padding=padding,
            scale=scale,
            dropout=dropout,
            max_workspace_bytes=max_workspace_bytes,
            backend=backend,
        )
        kv_dim = (num_kv_heads or num_heads) * self.head_dim

        def linear(out_features: int) -> nn.Linear:
            return nn.Linear(embed_dim, out_features, bias=bias, device=device, dtype=dtype)

        self.q_proj, self.k_proj, self.v_proj = linear(embed_dim), linear(kv_dim), linear(kv_dim)
        self.layer_norm = (
            nn.LayerNorm(embed_dim, eps=layer_norm_eps, device=device, dtype=dtype)
            if layer_norm
            else None
        )
        self.out_proj = linear(embed_dim)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise all parameters anew (MAGNETO, arXiv 2210.06423)."""
        gamma = self.config.gamma_init
        for projection, gain in (
            (self.q_proj, 1 / math.sqrt(2)),
            (self.k_proj, 1 / math.sqrt(2)),
            (self.v_proj, gamma / math.sqrt(2)),
            (self.out_proj, gamma),
        ):
            nn.init.xavier_uniform_(projection.weight, gain=gain)
            # Typed as a Tensor by torch, but None for bias=False.
            if self.config.bias:
                nn.init.zeros_(projection.bias)
        if self.layer_norm is not None:
            self.layer_norm.reset_parameters()

    def project(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """`(…, E)` inputs -> q `(…, H, D)` and k, v `(…, H_kv, D)`."""
        q, k, v = (
            projection(x).unflatten(-1, (-1, self.head_dim))
            for projection, x in (
                (self.q_proj, query),
                (self.k_proj, key),
                (self.v_proj, value),
            )
        )
        return q, k, v

    def attend(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        *,
        is_causal: bool = False,
        key_padding_mask: torch.Tensor | None = None,
        cu_seqlens: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Dilated attention of q `(B, S, H, D)` and k, v `(B, S, H_kv, D)`."""
        masks = {"key_padding_mask": key_padding_mask, "cu_seqlens": cu_seqlens}
        given = {name: mask for name, mask in masks.items() if mask is not None}
        return self.attention(q, k, v, is_causal=is_causal, **given)

    def combine(self, out: torch.Tensor) -> torch.Tensor:
        """LayerNorm and output projection: `(…, H, D)` -> `(…, E)`."""
        out = out.flatten(-2)
        return self.out_proj(out if self.layer_norm is None else self.layer_norm(out))

    @overload
    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        *,
        is_causal: bool = ...,
        attn_mask: torch.Tensor | None = ...,
        key_padding_mask: torch.Tensor | None = ...,
        cu_seqlens: torch.Tensor | None = ...,
    ) -> torch.Tensor: ...

    @overload
    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        *,
        is_causal: bool = ...,
        attn_mask: torch.Tensor | None = ...,
        key_padding_mask: torch.Tensor | None = ...,
        cu_seqlens: torch.Tensor | None = ...,
        need_weights: bool,
    ) -> tuple[torch.Tensor, None]: ...

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        *,
        is_causal: bool = False,
        attn_mask: torch.Tensor | None = None,
        key_padding_mask: torch.Tensor | None = None,
        cu_seqlens: torch.Tensor | None = None,
        **need_weights: Any,
    ) -> torch.Tensor | tuple[torch.Tensor, None]:
        """Self-attention of `(B, S, E)` query, key and value.

        Args:
            query, key, value: `(B, S, E)`, of one shape; `(T, E)` with `cu_seqlens`.
            is_causal: Position i sees only positions j ≤ i.
            attn_mask: Accepted where it says what `is_causal=True` says, as in calls from
                `nn.TransformerEncoderLayer`; any other mask is refused.
            key_padding_mask: `(B, S)`, True for keys that nobody sees; or, as
                `nn.TransformerEncoderLayer` passes it on, floating with −inf for these and 0 for
                the others.
            cu_seqlens: Where documents begin that are packed one after another, see
                `dilated_attention`.
            need_weights: If passed at all, the result is `(tensor, None)`, as callers written for
                `nn.MultiheadAttention` expect. The weights themselves are never formed.

        Returns:
            Shape of the query, or the pair of it and None if `need_weights` is passed.

        Raises:
            TypeError: If an unknown keyword is given.
            ValueError: If a shape does not fit, or a mask is given that cannot be honoured.
        """
        if unknown := need_weights.keys() - {"need_weights"}:
            raise TypeError(f"forward() has no argument {', '.join(sorted(unknown))}.")
        dims, rows = (3, "batch, sequence") if cu_seqlens is None else (2, "positions")
        for name, x in (("query", query), ("key", key), ("value", value)):
            if x.dim() != dims or x.shape[-1] != self.embed_dim:
                raise ValueError(
                    f"{name} has shape {tuple(x.shape)}; it must be ({rows}, {self.embed_dim})."
                )
        if attn_mask is not None:
            _check_mask_is_causal(attn_mask, query.shape[-2], is_causal)
        if key_padding_mask is not None and key_padding_mask.is_floating_point():
            key_padding_mask = _as_bool(key_padding_mask)
        q, k, v = self.project(query, key, value)
        out = self.attend(
            q, k, v, is_causal=is_causal, key_padding_mask=key_padding_mask, cu_seqlens=cu_seqlens
        )
        y = self.combine(out)
        return (y, None) if need_weights else y

    def extra_repr(self) -> str:
        """The sizes, for `repr`."""
        return f"embed_dim={self.embed_dim}, num_heads={self.num_heads}"


def _check_mask_is_causal(mask: torch.Tensor, seq_len: int, is_causal: bool) -> None:
    """Refuse every `attn_mask` but the causal one that accompanies `is_causal=True`."""
    if is_causal and mask.shape == (seq_len, seq_len):
        hides = mask if mask.dtype == torch.bool else mask == float("-inf")
        causal = torch.ones_like(hides).triu(1)
        adds_nothing = mask.dtype == torch.bool or not mask.masked_fill(causal, 0).any()
        if adds_nothing and torch.equal(hides, causal):
            return
    raise ValueError(
        f"attn_mask has shape {tuple(mask.shape)} with is_causal={is_causal}; the pattern decides "
        f"which keys a query sees, so pass attn_mask=None, and is_causal=True for causality."
    )


def _as_bool(key_padding_mask: torch.Tensor) -> torch.Tensor:
    """A mask of 0 and −inf, as PyTorch's own layers make it of a bool one, back to bool."""
    hidden = key_padding_mask == float("-inf")
    if key_padding_mask.masked_fill(hidden, 0).any():
        raise ValueError(
            "key_padding_mask holds values other than 0 and -inf; scores cannot be biased, so give "
            "a bool mask, True for keys to ignore."
        )
    return hidden
