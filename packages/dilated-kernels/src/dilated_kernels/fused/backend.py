"""Backend `triton`: the whole pattern by fused kernels, on strips too."""

from __future__ import annotations

import torch
from dilated_core import AttentionOutput, DilatedPattern
from dilated_core.backend import CONTRACT_VERSION, AttentionInputs

from dilated_kernels.fused.launch import Options, dilated_backward, dilated_forward, is_interpreted
from dilated_kernels.fused.tile_order import TileOrder

MAX_HEAD_DIM = 256


class TritonBackend:
    """Fused dilated attention in Triton.

    Args:
        tile_order: In which order the tiles of a launch start; results are the same to the bit.
    """

    name = "triton"
    priority = 50
    contract = CONTRACT_VERSION

    def __init__(self, *, tile_order: TileOrder = "row_major") -> None:
        self.tile_order: TileOrder = tile_order

    def why_not(self, inputs: AttentionInputs) -> list[str]:
        """See `AttentionBackend.why_not`."""
        reasons: list[str] = []
        if inputs.device.type == "cpu":
            if not is_interpreted():
                reasons.append("no")
        return reasons

    def dilated_forward(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        pattern: DilatedPattern,
        *,
        is_causal: bool,
        scale: float,
        dropout_p: float,
        dropout_seed: int,
        key_padding_mask: torch.Tensor | None,
        cu_seqlens: torch.Tensor | None,
    ) -> AttentionOutput:
        """See `AttentionBackend`."""
        options = self._options(
            is_causal, scale, dropout_p, dropout_seed, key_padding_mask, cu_seqlens
        )
        return dilated_forward(q, k, v, pattern, options)

    def dilated_backward(
        self,
        dout: torch.Tensor,
        dlse: torch.Tensor | None,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        out: torch.Tensor,
        lse: torch.Tensor,
        pattern: DilatedPattern,
        *,
        is_causal: bool,
        scale: float,
        dropout_p: float,
        dropout_seed: int,
        key_padding_mask: torch.Tensor | None,
        cu_seqlens: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """See `AttentionBackend`."""
        options = self._options(
            is_causal, scale, dropout_p, dropout_seed, key_padding_mask, cu_seqlens
        )
        return dilated_backward(dout, dlse, q, k, v, out, lse, pattern, options)

    def forward(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        *,
        is_causal: bool,
        scale: float,
        dropout_p: float,
        dropout_seed: int,
        key_padding_mask: torch.Tensor | None,
    ) -> AttentionOutput:
        """See `AttentionBackend.forward`: dense attention is a pattern of one branch."""
        options = self._options(is_causal, scale, dropout_p, dropout_seed, key_padding_mask, None)
        return dilated_forward(q, k, v, _dense(q), options)

    def backward(
        self,
        dout: torch.Tensor,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        out: torch.Tensor,
        lse: torch.Tensor,
        *,
        is_causal: bool,
        scale: float,
        dropout_p: float,
        dropout_seed: int,
        key_padding_mask: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """See `AttentionBackend.backward`."""
        options = self._options(is_causal, scale, dropout_p, dropout_seed, key_padding_mask, None)
        return dilated_backward(dout, None, q, k, v, out, lse, _dense(q), options)

    def _options(
        self,
        is_causal: bool,
        scale: float,
        dropout_p: float,
        dropout_seed: int,
        key_padding_mask: torch.Tensor | None,
        cu_seqlens: torch.Tensor | None,
    ) -> Options:
        mask = None if key_padding_mask is None else key_padding_mask.view(torch.uint8)
        return Options(
            *(is_causal, scale, dropout_p, dropout_seed, mask, cu_seqlens, self.tile_order)
        )


def _dense(q: torch.Tensor) -> DilatedPattern:
    return DilatedPattern([max(1, q.shape[1])], [1])


backend = TritonBackend()
