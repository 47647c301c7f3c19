"""Content-adaptive block-sparse attention with the projections of a transformer layer."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from dilated_core import DilatedAttentionConfig, MultiheadConfig, MultiheadDilatedAttention
from dilated_core.modules.config import MULTIHEAD_ARGUMENTS
from dilated_core.modules.conversion import convert_multihead_attention
from dilated_core.modules.options import from_options

from dilated_sparse.adaptive.attention import AdaptiveSparseAttention
from dilated_sparse.adaptive.config import (
    ELSEWHERE,
    AdaptiveMultiheadArguments,
    AdaptiveSparseConfig,
)


class AdaptiveSparseMultiheadAttention(MultiheadDilatedAttention):
    """`dilated_core.MultiheadDilatedAttention` with content-adaptive attention inside.

    Projections, initialisation, masks, `from_multihead_attention` and the result are those of that
    class. `AdaptiveSparseAttention` tells how the selection learns.

    Args:
        multihead_config, attention_config: A `MultiheadConfig` and an `AdaptiveSparseConfig`. Or,
            instead of them, their options by name, which those classes explain; `embed_dim` and
            `num_heads` are required and may be positional.

    Raises:
        TypeError, ValueError: As `MultiheadConfig` and `AdaptiveSparseConfig` do.

    Example:
        >>> import torch
        >>> mha = AdaptiveSparseMultiheadAttention(64, 4, sparsity_ratio=0.2, block_size=16)
        >>> x = torch.randn(2, 500, 64)
        >>> mha(x, x, x, is_causal=True).shape
        torch.Size([2, 500, 64])
    """

    @from_options(
        AdaptiveMultiheadArguments,
        elsewhere=ELSEWHERE | MULTIHEAD_ARGUMENTS,
        multihead_config=MultiheadConfig,
        attention_config=AdaptiveSparseConfig,
    )
    def __init__(  # pyright: ignore[reportIncompatibleVariableOverride]
        self, multihead_config: MultiheadConfig, attention_config: AdaptiveSparseConfig
    ) -> None:
        super().__init__(multihead_config, DilatedAttentionConfig())
        # The base class calls it with tensors and masks, as it calls its own.
        self.attention = AdaptiveSparseAttention(  # pyright: ignore
            attention_config,
            num_heads=multihead_config.num_heads,
            head_dim=self.head_dim,
            num_kv_heads=multihead_config.num_kv_heads,
            device=multihead_config.device,
            dtype=multihead_config.dtype,
        )

    def load_multihead_attention(self, state_dict: Mapping[str, torch.Tensor]) -> None:
        """Copy the weights of an `nn.MultiheadAttention`; the gate keeps its own.

        See `MultiheadDilatedAttention.load_multihead_attention`.
        """
        gate = {name: x for name, x in self.state_dict().items() if name.startswith("attention.")}
        converted = convert_multihead_attention(state_dict, self.config, self)
        self.load_state_dict(converted | gate)

    def reset_parameters(self) -> None:
        """Initialise all parameters anew."""
        super().reset_parameters()
        if isinstance(self.attention, AdaptiveSparseAttention):  # the base class calls it earlier
            self.attention.gate.reset_parameters()
