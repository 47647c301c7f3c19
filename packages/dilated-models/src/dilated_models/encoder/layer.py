"""One layer of a LongNet encoder: attention and feed-forward, each around a residual."""

from __future__ import annotations

from typing import Never

import torch
from dilated_core import MultiheadConfig, MultiheadDilatedAttention
from dilated_core.checks import check_float_dtype, check_tensor
from dilated_core.modules.options import check_forward_names, from_options, show_options
from dilated_core.positions.rotary import Rotation, rotate
from torch import Tensor, nn

from dilated_models.encoder.config import ELSEWHERE, EncoderLayerArguments, EncoderLayerConfig
from dilated_models.layers.drop_path import drop_path
from dilated_models.layers.feed_forward import FeedForward

_ROWS_AT_ONCE = 8192
"""Rows that pass the feed-forward together in inference: 100 MB of activations at width 3072."""


class DilatedTransformerEncoderLayer(nn.Module):
    """x + attention(LayerNorm(x)), then x + feed_forward(LayerNorm(x)), as in LongNet's encoder.

    Each half has a LayerNorm before it and another inside it (MAGNETO's sub-LayerNorm, arXiv
    2210.06423, figure 2), as in torchscale. The parts have torchscale's names. A layer also works
    inside `nn.TransformerEncoder`:

        layer = DilatedTransformerEncoderLayer(
            512, 8, segment_lengths=[1024, 4096], dilation_rates=[1, 4]
        )
        encoder = nn.TransformerEncoder(layer, 6, enable_nested_tensor=False)

    Args:
        config: An `EncoderLayerConfig`. Or, instead of it, its options by name; `d_model`,
            `nhead`, `segment_lengths` and `dilation_rates` may be positional.
        device: Of the parameters.
        dtype: Of the parameters; a floating-point dtype.

    Raises:
        TypeError, ValueError: As `EncoderLayerConfig` does.

    Example:
        >>> layer = DilatedTransformerEncoderLayer(
        ...     32, 4, dim_feedforward=64, segment_lengths=[8, 32], dilation_rates=[1, 4]
        ... )
        >>> layer(torch.randn(2, 50, 32)).shape
        torch.Size([2, 50, 32])
    """

    @from_options(EncoderLayerArguments, elsewhere=ELSEWHERE, config=EncoderLayerConfig)
    def __init__(
        self,
        config: EncoderLayerConfig,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if dtype is not None:
            check_float_dtype(dtype)
        self.config = config

        def layer_norm() -> nn.LayerNorm:
            eps = config.layer_norm_eps
            return nn.LayerNorm(config.d_model, eps=eps, device=device, dtype=dtype)

        self.self_attn_layer_norm = layer_norm()
        self.self_attn = MultiheadDilatedAttention(
            MultiheadConfig(
                embed_dim=config.d_model,
                num_heads=config.nhead,
                num_kv_heads=config.num_kv_heads,
                layer_norm_eps=config.layer_norm_eps,
                gamma_init=config.gamma_init,
                device=device,
                dtype=dtype,
            ),
            config.attention,
        )
        self.final_layer_norm = layer_norm()
        self.ffn = FeedForward(config, device=device, dtype=dtype)
        self.dropout = nn.Dropout(config.dropout)

    def reset_parameters(self) -> None:
        """Draw the weights anew."""
        self.self_attn_layer_norm.reset_parameters()
        self.self_attn.reset_parameters()
        self.final_layer_norm.reset_parameters()
        self.ffn.reset_parameters()

    def forward(
        self,
        src: Tensor,
        src_mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        is_causal: bool = False,
        *,
        cu_seqlens: Tensor | None = None,
        rotation: Rotation | None = None,
        **unknown: Never,
    ) -> Tensor:
        """Map `(B, S, d_model)` to the same shape.

        Args:
            src: `(B, S, d_model)`; `(T, d_model)` with `cu_seqlens`.
            src_mask: The causal mask that accompanies `is_causal=True`, as `nn.TransformerEncoder`
                passes it on; any other mask is refused.
            src_key_padding_mask: `(B, S)`, True for positions that nobody sees.
            is_causal: Whether a position sees no later one.
            cu_seqlens: Where sequences begin that are packed one after another, see
                `dilated_core.dilated_attention`.
            rotation: Of the S positions, from `dilated_core.positions.rotary`; None leaves queries
                and keys unchanged. Not with `src_mask`.

        Raises:
            TypeError: If an argument has the wrong type or is unknown.
            ValueError: If a shape does not fit, or a mask cannot be honoured.
        """
        known = ("src", "src_mask", "src_key_padding_mask", "is_causal", "cu_seqlens", "rotation")
        check_forward_names(self, unknown, known, self.config)
        check_tensor("src", src)
        normed = self.self_attn_layer_norm(src)
        if rotation is None:
            attended = self.self_attn(
                normed,
                normed,
                normed,
                is_causal=is_causal,
                attn_mask=src_mask,
                key_padding_mask=src_key_padding_mask,
                cu_seqlens=cu_seqlens,
            )
        elif src_mask is not None:
            raise ValueError("src_mask and rotation are both given; leave src_mask out.")
        else:
            q, k, v = self.self_attn.project(normed, normed, normed)
            attended = self.self_attn.combine(
                self.self_attn.attend(
                    rotate(q, rotation.q_cos, rotation.q_sin),
                    rotate(k, rotation.k_cos, rotation.k_sin),
                    v,
                    is_causal=is_causal,
                    key_padding_mask=src_key_padding_mask,
                    cu_seqlens=cu_seqlens,
                )
            )
        x = src + self._added(attended, cu_seqlens)
        return x + self._added(self._feed_forward(x), cu_seqlens)

    def _added(self, x: Tensor, cu_seqlens: Tensor | None) -> Tensor:
        """What a half adds to the residual, after dropout."""
        x = self.dropout(x)
        p = self.config.drop_path if self.training else 0.0
        return drop_path(x, p, cu_seqlens) if p else x

    def _feed_forward(self, x: Tensor) -> Tensor:
        """The second half. Inference takes a part of the rows at a time: the wide rows are large.

        A slide of 45,681 tiles would need three tensors of 561 MB at width 3072.
        """
        rows = x.numel() // max(1, x.shape[-1])
        if torch.is_grad_enabled() or rows <= _ROWS_AT_ONCE or torch.compiler.is_compiling():
            return self.ffn(self.final_layer_norm(x))
        flat = x.flatten(0, -2)
        starts = range(0, rows, _ROWS_AT_ONCE)
        parts = [self.ffn(self.final_layer_norm(flat[i : i + _ROWS_AT_ONCE])) for i in starts]
        return torch.cat(parts).view(x.shape)

    def extra_repr(self) -> str:
        """The options that are not seen in the submodules, for `repr`."""
        return show_options(self.config, "d_model", "nhead")
