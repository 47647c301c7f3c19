"""One layer of a LongNet decoder: attention, attention to a memory, feed-forward."""

from __future__ import annotations

from typing import Never

import torch
from dilated_core.checks import check_bool, check_tensor
from dilated_core.modules.masks import as_bool_mask, check_mask_is_causal
from dilated_core.modules.options import check_forward_names, from_options
from dilated_core.positions.rotary import Rotation
from torch import Tensor, nn

from dilated_models.encoder.config import ELSEWHERE, EncoderLayerArguments, EncoderLayerConfig
from dilated_models.encoder.halves import TransformerLayer
from dilated_models.layers.cross_attention import CrossAttention, Memory


class DilatedTransformerDecoderLayer(TransformerLayer):
    """Dilated self-attention, dense attention to a memory, feed-forward, each around a residual.

    The halves of `DilatedTransformerEncoderLayer`, and between them
    x + cross_attention(LayerNorm(x), memory), as in torchscale, whose names the parts have. The
    memory may have any length. The layer works inside `nn.TransformerDecoder`:

        layer = DilatedTransformerDecoderLayer(
            512, 8, segment_lengths=[1024, 4096], dilation_rates=[1, 4]
        )
        decoder = nn.TransformerDecoder(layer, 6)
        y = decoder(tgt, memory, tgt_is_causal=True)

    As in PyTorch's layer, a call is causal only if it is told so. A causal mask with
    `tgt_is_causal=True` is accepted, but not needed.

    Args:
        config: An `EncoderLayerConfig`. Or, instead of it, its options by name; `d_model`,
            `nhead`, `segment_lengths` and `dilation_rates` may be positional. `attention_dropout`
            is that of both attentions. `backend` is that of dilated and of causal attention; other
            attention to the memory runs PyTorch's `scaled_dot_product_attention`.
        device: Of the parameters.
        dtype: Of the parameters; a floating-point dtype.

    Raises:
        TypeError, ValueError: As `EncoderLayerConfig` does.

    Example:
        >>> layer = DilatedTransformerDecoderLayer(
        ...     32, 4, dim_feedforward=64, segment_lengths=[8, 32], dilation_rates=[1, 4]
        ... )
        >>> tgt, memory = torch.randn(2, 50, 32), torch.randn(2, 70, 32)
        >>> layer(tgt, memory, tgt_is_causal=True).shape
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
        self.encoder_attn_layer_norm = nn.LayerNorm(
            config.d_model, eps=config.layer_norm_eps, device=device, dtype=dtype
        )
        self.encoder_attn = CrossAttention(
            config.d_model,
            config.nhead,
            num_kv_heads=config.num_kv_heads,
            dropout=config.attention_dropout,
            backend=config.backend,
            device=device,
            dtype=dtype,
        )

    def reset_parameters(self) -> None:
        """Draw the weights anew."""
        super().reset_parameters()
        self.encoder_attn_layer_norm.reset_parameters()
        self.encoder_attn.reset_parameters()

    def forward(
        self,
        tgt: Tensor,
        memory: Tensor,
        tgt_mask: Tensor | None = None,
        memory_mask: Tensor | None = None,
        tgt_key_padding_mask: Tensor | None = None,
        memory_key_padding_mask: Tensor | None = None,
        tgt_is_causal: bool = False,
        memory_is_causal: bool = False,
        *,
        cu_seqlens: Tensor | None = None,
        memory_cu_seqlens: Tensor | None = None,
        rotation: Rotation | None = None,
        **unknown: Never,
    ) -> Tensor:
        """Map the inputs to outputs of the same shape.

        Args:
            tgt: `(B, M, d_model)`, or `(M, B, d_model)` for a layer with `batch_first=False`;
                `(T, d_model)` with `cu_seqlens`.
            memory: `(B, N, d_model)`, or as `tgt`; `(T, d_model)` with `memory_cu_seqlens`.
            tgt_mask: The causal mask that accompanies `tgt_is_causal=True`, as
                `nn.TransformerDecoder` passes it on; any other mask is refused.
            memory_mask: Likewise, of `memory_is_causal=True`.
            tgt_key_padding_mask: `(B, M)`, True for positions of `tgt` that nobody sees.
            memory_key_padding_mask: `(B, N)`, True for rows of the memory that nobody sees.
            tgt_is_causal: Whether a position sees no later one.
            memory_is_causal: Whether position i sees the rows j ≤ i of the memory only; M is N.
            cu_seqlens: Where the sequences begin that are packed one after another in `tgt`.
            memory_cu_seqlens: Likewise, in `memory`; the same number of sequences.
            rotation: Of the positions of `tgt`, from `dilated_core.positions.rotary`; None leaves
                queries and keys unchanged. The memory is never rotated. Not with `tgt_mask`.

        Raises:
            TypeError: If an argument has the wrong type or is unknown.
            ValueError: If a shape does not fit, or a mask cannot be honoured.
        """
        known = (
            "tgt", "memory", "tgt_mask", "memory_mask", "tgt_key_padding_mask",
            "memory_key_padding_mask", "tgt_is_causal", "memory_is_causal", "cu_seqlens",
            "memory_cu_seqlens", "rotation",
        )  # fmt: skip
        check_forward_names(self, unknown, known, self.config)
        check_tensor("tgt", tgt)
        check_tensor("memory", memory)
        is_transposed = not self.config.batch_first and cu_seqlens is None
        x, memory = (y.transpose(0, 1) if is_transposed else y for y in (tgt, memory))
        self._check_memory(x, memory, cu_seqlens, memory_cu_seqlens, memory_is_causal)
        if memory_mask is not None:
            check_tensor("memory_mask", memory_mask)
            if not memory_is_causal:
                raise ValueError(
                    f"memory_mask has shape {tuple(memory_mask.shape)}; attention to the memory is "
                    f"dense or causal, so leave it out, and give memory_is_causal=True for "
                    f"causality or memory_key_padding_mask to hide rows."
                )
            check_mask_is_causal(memory_mask, x, memory_is_causal)
        if memory_key_padding_mask is not None:
            check_tensor("memory_key_padding_mask", memory_key_padding_mask)
            memory_key_padding_mask = as_bool_mask(memory_key_padding_mask, memory)
        attended = self._self_attention(
            *(x, tgt_mask, tgt_key_padding_mask, tgt_is_causal, cu_seqlens, rotation), "tgt_mask"
        )
        x = x + self._added(attended, cu_seqlens)
        seen = self.encoder_attn(
            self.encoder_attn_layer_norm(x),
            Memory(memory, memory_is_causal, memory_cu_seqlens, memory_key_padding_mask),
            cu_seqlens=cu_seqlens,
        )
        x = x + self._added(seen, cu_seqlens)
        x = x + self._added(self._feed_forward(x), cu_seqlens)
        return x.transpose(0, 1) if is_transposed else x

    def _check_memory(
        self,
        x: Tensor,
        memory: Tensor,
        cu_seqlens: Tensor | None,
        memory_cu_seqlens: Tensor | None,
        is_causal: bool,
    ) -> None:
        if (cu_seqlens is None) != (memory_cu_seqlens is None):
            raise ValueError(
                "of cu_seqlens and memory_cu_seqlens one is given; both sequences must be packed, "
                "or none, so give both."
            )
        dims = 3 if cu_seqlens is None else 2
        batch = memory.shape[:1] if dims == 3 else ()
        if (
            memory.dim() != dims
            or memory.shape[-1] != self.config.d_model
            or (batch and batch != x.shape[:1])
        ):
            raise ValueError(
                f"memory has shape {tuple(memory.shape)} and tgt {tuple(x.shape)}, the batch "
                f"first; memory must have {dims} dimensions, the last of {self.config.d_model}, "
                f"and as many sequences as tgt."
            )
        bounds = None
        if cu_seqlens is not None and memory_cu_seqlens is not None:
            bounds = cu_seqlens, memory_cu_seqlens
        if bounds is not None and len(bounds[0]) != len(bounds[1]):
            raise ValueError(
                f"cu_seqlens has {len(bounds[0])} entries and memory_cu_seqlens "
                f"{len(bounds[1])}; they must have equally many, one memory for each sequence."
            )
        if check_bool("memory_is_causal", is_causal) and (
            memory.shape != x.shape or (bounds is not None and not torch.equal(*bounds))
        ):
            raise ValueError(
                f"memory_is_causal is True, tgt has shape {tuple(x.shape)} and memory "
                f"{tuple(memory.shape)}; causal attention needs as many rows of the memory as "
                f"positions, in each sequence, so pass memory_is_causal=False."
            )
