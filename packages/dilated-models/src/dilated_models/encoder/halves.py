"""What the layers of encoder and decoder share: MAGNETO's halves, with torchscale's names."""

from __future__ import annotations

import torch
from dilated_core import MultiheadConfig, MultiheadDilatedAttention
from dilated_core.checks import check_float_dtype
from dilated_core.modules.options import show_options
from dilated_core.positions.rotary import Rotation, rotate
from torch import Tensor, nn

from dilated_models.encoder.config import EncoderLayerConfig
from dilated_models.layers.drop_path import drop_path
from dilated_models.layers.feed_forward import FeedForward

_ROWS_AT_ONCE = 8192
"""Rows that pass the feed-forward together in inference: 100 MB of activations at width 3072."""


class TransformerLayer(nn.Module):
    """Self-attention and feed-forward, each with a LayerNorm before it and another inside it.

    Args:
        config: Of the layer.
        device: Of the parameters.
        dtype: Of the parameters; a floating-point dtype.
    """

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
        # nn.TransformerEncoder and nn.TransformerDecoder read here which dimension is the sequence.
        # The attention itself always gets (B, S, E).
        self.self_attn.batch_first = config.batch_first
        self.final_layer_norm = layer_norm()
        self.ffn = FeedForward(config, device=device, dtype=dtype)
        self.dropout = nn.Dropout(config.dropout)

    def reset_parameters(self) -> None:
        """Draw the weights anew."""
        self.self_attn_layer_norm.reset_parameters()
        self.self_attn.reset_parameters()
        self.final_layer_norm.reset_parameters()
        self.ffn.reset_parameters()

    def _self_attention(
        self,
        x: Tensor,
        mask: Tensor | None,
        key_padding_mask: Tensor | None,
        is_causal: bool,
        cu_seqlens: Tensor | None,
        rotation: Rotation | None,
        mask_name: str,
    ) -> Tensor:
        """The first half, without its residual."""
        normed = self.self_attn_layer_norm(x)
        if rotation is None:
            return self.self_attn(
                normed,
                normed,
                normed,
                is_causal=is_causal,
                attn_mask=mask,
                key_padding_mask=key_padding_mask,
                cu_seqlens=cu_seqlens,
            )
        if mask is not None:
            raise ValueError(f"{mask_name} and rotation are both given; leave {mask_name} out.")
        q, k, v = self.self_attn.project(normed, normed, normed)
        return self.self_attn.combine(
            self.self_attn.attend(
                rotate(q, rotation.q_cos, rotation.q_sin),
                rotate(k, rotation.k_cos, rotation.k_sin),
                v,
                is_causal=is_causal,
                key_padding_mask=key_padding_mask,
                cu_seqlens=cu_seqlens,
            )
        )

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
