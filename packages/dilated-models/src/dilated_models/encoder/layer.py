"""One layer of a LongNet encoder: attention and feed-forward, each around a residual."""

from __future__ import annotations

from typing import Never

import torch
from dilated_core.checks import check_tensor
from dilated_core.modules.options import check_forward_names, from_options
from dilated_core.positions.rotary import Rotation
from torch import Tensor

from dilated_models.encoder.config import ELSEWHERE, EncoderLayerArguments, EncoderLayerConfig
from dilated_models.encoder.halves import TransformerLayer


class DilatedTransformerEncoderLayer(TransformerLayer):
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
        super().__init__(config, device=device, dtype=dtype)

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
        """Map the inputs to outputs of the same shape.

        Args:
            src: `(B, S, d_model)`, or `(S, B, d_model)` for a layer with `batch_first=False`;
                `(T, d_model)` with `cu_seqlens`.
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
        x = src if self.config.batch_first or cu_seqlens is not None else src.transpose(0, 1)
        attended = self._self_attention(
            *(x, src_mask, src_key_padding_mask, is_causal, cu_seqlens, rotation), "src_mask"
        )
        x = x + self._added(attended, cu_seqlens)
        x = x + self._added(self._feed_forward(x), cu_seqlens)
        return x if self.config.batch_first or cu_seqlens is not None else x.transpose(0, 1)
