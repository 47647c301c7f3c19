"""Dilated attention with the projections of a transformer layer."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Self, overload

import torch
from torch import nn

from dilated_core.checks import check_bool, check_tensor
from dilated_core.modules.config import (
    FORWARD_ARGUMENTS,
    MULTIHEAD_ARGUMENTS,
    DilatedAttentionConfig,
    MultiheadArguments,
    MultiheadConfig,
)
from dilated_core.modules.conversion import convert_multihead_attention, options_of
from dilated_core.modules.dilated import DilatedAttention
from dilated_core.modules.masks import as_bool_mask, check_mask_is_causal
from dilated_core.modules.options import check_forward_names, from_options, show_options


class MultiheadDilatedAttention(nn.Module):
    """Multi-head self-attention with dilated attention inside, as MAGNETO arranges it.

    Query, key and value projections, dilated attention, LayerNorm on its output, output projection.
    Initialised as in MAGNETO (arXiv 2210.06423): xavier-uniform, with gain 1/√2 on q and k, γ/√2 on
    v and γ on the output; biases 0.

    Two differences from `nn.MultiheadAttention` raise no error, because no call shows them:

    - Inputs are `(B, S, E)`, always. A layer of PyTorch around this module must be built with
      `batch_first=True`; with its default, `(S, B, E)`, attention would run across the batch.
    - A call returns one tensor. `y, w = mha(x, x, x)` would unpack a batch of two. Pass
      `need_weights=False` to get the pair `(y, None)`.

    In `nn.TransformerEncoder`, with the weights of the layer's own attention:

        layer = nn.TransformerEncoderLayer(32, 4, batch_first=True)
        layer.self_attn = MultiheadDilatedAttention.from_multihead_attention(
            layer.self_attn, segment_lengths=[8, 32], dilation_rates=[1, 4]
        )
        encoder = nn.TransformerEncoder(layer, 6, enable_nested_tensor=False)

    Args:
        multihead_config, attention_config: A `MultiheadConfig` and a `DilatedAttentionConfig`. Or,
            instead of them, their options by name, which those classes explain; `embed_dim`,
            `num_heads`, `segment_lengths` and `dilation_rates` are required, and the first two may
            be positional.

    Raises:
        TypeError, ValueError: As `MultiheadConfig` and `DilatedAttentionConfig` do.

    Example:
        >>> mha = MultiheadDilatedAttention(
        ...     embed_dim=32, num_heads=4, segment_lengths=[8, 32], dilation_rates=[1, 4]
        ... )
        >>> x = torch.randn(2, 50, 32)
        >>> mha(x, x, x, is_causal=True).shape
        torch.Size([2, 50, 32])
    """

    # nn.TransformerEncoderLayer reads these three. The last two keep it from its fused inference
    # path, which would read weights that this module does not have.
    batch_first = True
    in_proj_bias = None
    _qkv_same_embed_dim = False

    @from_options(
        MultiheadArguments,
        elsewhere=MULTIHEAD_ARGUMENTS,
        multihead_config=MultiheadConfig,
        attention_config=DilatedAttentionConfig,
    )
    def __init__(
        self, multihead_config: MultiheadConfig, attention_config: DilatedAttentionConfig
    ) -> None:
        super().__init__()
        config = self.config = multihead_config
        self.embed_dim, self.num_heads = config.embed_dim, config.num_heads
        self.head_dim = config.embed_dim // config.num_heads
        self.attention = DilatedAttention(attention_config)
        kv_dim = (config.num_kv_heads or config.num_heads) * self.head_dim

        def linear(out_features: int) -> nn.Linear:
            return nn.Linear(
                config.embed_dim,
                out_features,
                bias=config.bias,
                device=config.device,
                dtype=config.dtype,
            )

        self.q_proj = linear(config.embed_dim)
        self.k_proj, self.v_proj = linear(kv_dim), linear(kv_dim)
        self.layer_norm = (
            nn.LayerNorm(
                config.embed_dim,
                eps=config.layer_norm_eps,
                device=config.device,
                dtype=config.dtype,
            )
            if config.layer_norm
            else None
        )
        self.out_proj = linear(config.embed_dim)
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

    @classmethod
    def from_multihead_attention(cls, attention: nn.MultiheadAttention, **options: Any) -> Self:
        """Build the module that replaces an `nn.MultiheadAttention`, with a copy of its weights.

        Args:
            attention: The module to replace, built with `batch_first=True`. It stays as it is.
            **options: `segment_lengths`, `dilation_rates` and other options of
                `DilatedAttentionConfig`. Sizes, bias, dropout, device, dtype and training mode are
                those of `attention`, and there is no LayerNorm.

        Raises:
            TypeError: If `attention` is of another class, or an option is unknown.
            ValueError: If `attention` does what this module cannot do.

        Example:
            >>> dense = nn.MultiheadAttention(32, 4, batch_first=True)
            >>> mha = MultiheadDilatedAttention.from_multihead_attention(
            ...     dense, segment_lengths=[64], dilation_rates=[1]
            ... )
            >>> x = torch.randn(2, 50, 32)  # no longer than the segment, so both are dense
            >>> torch.allclose(mha(x, x, x), dense(x, x, x)[0], atol=1e-6)
            True
        """
        module = cls(**(options_of(attention) | options))
        module.load_multihead_attention(attention.state_dict())
        return module.train(attention.training)

    def load_multihead_attention(self, state_dict: Mapping[str, torch.Tensor]) -> None:
        """Copy the weights of an `nn.MultiheadAttention` with the same `num_heads`.

        Parameters keep their device and dtype. Nothing is copied if there is an error. A state dict
        shows neither `num_heads` nor `add_zero_attn`, so check these yourself, or use
        `from_multihead_attention`.

        Args:
            state_dict: That of the module, as in `layer.self_attn.state_dict()`. Its keys and
                shapes must be exactly those expected.

        Raises:
            TypeError: If `state_dict` is no dict, or an entry no floating-point tensor.
            ValueError: If a key or shape does not fit, or this module has a part without
                counterpart there: LayerNorm, or fewer heads of k and v.
        """
        self.load_state_dict(convert_multihead_attention(state_dict, self.config, self))

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
        # A module that replaces `attention` may lack mask arguments, so absent masks are left out.
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
            attn_mask: The causal mask that accompanies `is_causal=True`, as in calls from
                `nn.TransformerEncoderLayer`; any other mask is refused.
            key_padding_mask: `(B, S)`, True for keys that nobody sees; or, as
                `nn.TransformerEncoderLayer` passes it on, floating with −inf for these and 0 for
                the others.
            cu_seqlens: Where documents begin that are packed one after another, see
                `dilated_attention`.
            need_weights: If passed at all, True or False, the result is `(tensor, None)`, as
                callers written for `nn.MultiheadAttention` expect. The weights themselves are never
                formed.

        Returns:
            One tensor of the query's shape; or that tensor and None, if `need_weights` is passed.
            To unpack the one tensor, as in `y, w = mha(x, x, x)`, is a mistake that raises no error
            for a batch of two.

        Raises:
            TypeError: If an unknown keyword is given, or an input or mask is no tensor.
            ValueError: If a shape does not fit, or a mask is given that cannot be honoured.
        """
        wants_pair = "need_weights" in need_weights
        if wants_pair:
            check_bool("need_weights", need_weights["need_weights"])
        unknown = {name: value for name, value in need_weights.items() if name != "need_weights"}
        known = ("need_weights", "attn_mask", *FORWARD_ARGUMENTS)
        check_forward_names(self, unknown, known, self.config, self.attention.config)
        dims, rows = (3, "batch, sequence") if cu_seqlens is None else (2, "positions")
        for name, x in (("query", query), ("key", key), ("value", value)):
            check_tensor(name, x)
            if x.dim() != dims or x.shape[-1] != self.embed_dim:
                raise ValueError(
                    f"{name} has shape {tuple(x.shape)}; it must be ({rows}, {self.embed_dim})."
                )
        if attn_mask is not None:
            check_tensor("attn_mask", attn_mask)
            check_mask_is_causal(attn_mask, query, is_causal)
        if key_padding_mask is not None:
            check_tensor("key_padding_mask", key_padding_mask)
            key_padding_mask = as_bool_mask(key_padding_mask, query)
        q, k, v = self.project(query, key, value)
        out = self.attend(
            q, k, v, is_causal=is_causal, key_padding_mask=key_padding_mask, cu_seqlens=cu_seqlens
        )
        y = self.combine(out)
        return (y, None) if wants_pair else y

    def extra_repr(self) -> str:
        """The sizes, and other options but device and dtype if not the default, for `repr`."""
        placed = replace(self.config, device=None, dtype=None)
        return show_options(placed, "embed_dim", "num_heads")
