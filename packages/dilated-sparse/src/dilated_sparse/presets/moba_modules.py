"""MoBA as PyTorch modules, and by the name `moba` in core's factories."""

from __future__ import annotations

from typing import Any, Never

import torch
from dilated_core import (
    AttentionVariant,
    DilatedAttentionConfig,
    MultiheadConfig,
    MultiheadDilatedAttention,
)
from dilated_core.modules.config import FORWARD_ARGUMENTS, MULTIHEAD_ARGUMENTS
from dilated_core.modules.options import check_forward_names, from_options, show_options
from torch import nn

from dilated_sparse.modules.factory import without_branches
from dilated_sparse.presets.config import MoBAConfig, MoBAMultiheadArguments
from dilated_sparse.presets.moba import moba_attention


class MoBAAttention(nn.Module):
    """`moba_attention` with its options as a module without parameters.

    Args:
        config: A `MoBAConfig`. Or, instead of it, its options by name, which that class explains.

    Raises:
        TypeError, ValueError: As `MoBAConfig` does.

    Example:
        >>> attention = MoBAAttention(block_size=64, topk=4)
        >>> q = k = v = torch.randn(1, 1000, 4, 16)
        >>> attention(q, k, v, is_causal=True).shape
        torch.Size([1, 1000, 4, 16])
    """

    @from_options(MoBAConfig, elsewhere=FORWARD_ARGUMENTS, config=MoBAConfig)
    def __init__(self, config: MoBAConfig) -> None:
        super().__init__()
        self.config = config

    def forward(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        is_causal: bool = False,
        *,
        key_padding_mask: torch.Tensor | None = None,
        cu_seqlens: torch.Tensor | None = None,
        **unknown: Never,
    ) -> torch.Tensor:
        """`(B, S, H, D)` q, `(B, S, H_kv, D)` k, v -> `(B, S, H, D)`; see `moba_attention`.

        Raises:
            ValueError: If `is_causal` is not True.
        """
        config = self.config
        check_forward_names(self, unknown, FORWARD_ARGUMENTS, config)
        check_is_causal("MoBA", is_causal)
        return moba_attention(
            q,
            k,
            v,
            config.block_size,
            config.topk,
            config.scale,
            dropout_p=config.dropout if self.training else 0.0,
            key_padding_mask=key_padding_mask,
            cu_seqlens=cu_seqlens,
            backend=config.backend,
        )

    def extra_repr(self) -> str:
        """The block size, topk and the options that differ from their defaults, for `repr`."""
        return show_options(self.config, "block_size", "topk")


class MoBAMultiheadAttention(MultiheadDilatedAttention):
    """`dilated_core.MultiheadDilatedAttention` with MoBA inside; always causal.

    Projections, initialisation, masks, `from_multihead_attention` and the result are those of that
    class.

    Args:
        multihead_config, attention_config: A `MultiheadConfig` and a `MoBAConfig`. Or, instead of
            them, their options by name, which those classes explain; `embed_dim` and `num_heads`
            are required and may be positional.

    Raises:
        TypeError, ValueError: As `MultiheadConfig` and `MoBAConfig` do.

    Example:
        >>> mha = MoBAMultiheadAttention(64, 4, block_size=16, topk=4)
        >>> x = torch.randn(2, 500, 64)
        >>> mha(x, x, x, is_causal=True).shape
        torch.Size([2, 500, 64])
    """

    @from_options(
        MoBAMultiheadArguments,
        elsewhere=MULTIHEAD_ARGUMENTS,
        multihead_config=MultiheadConfig,
        attention_config=MoBAConfig,
    )
    def __init__(  # pyright: ignore[reportIncompatibleVariableOverride]
        self, multihead_config: MultiheadConfig, attention_config: MoBAConfig
    ) -> None:
        super().__init__(multihead_config, DilatedAttentionConfig())
        # The base class calls it with tensors and masks, as it calls its own.
        self.attention = MoBAAttention(attention_config)  # pyright: ignore


def check_is_causal(name: str, is_causal: bool) -> None:
    """Refuse attention that is not causal.

    Raises:
        ValueError: If `is_causal` is not True.
    """
    if is_causal is not True:
        raise ValueError(
            f"is_causal is {is_causal!r}; {name} is defined for causal attention only, so pass "
            f"is_causal=True."
        )


def _attention(**options: Any) -> MoBAAttention:
    return MoBAAttention(**_own(options))


def _multihead(**options: Any) -> MoBAMultiheadAttention:
    return MoBAMultiheadAttention(**_own(options))


def _own(options: dict[str, Any]) -> dict[str, Any]:
    return without_branches(options, "moba", MoBAConfig, "block_size and topk")


VARIANT = AttentionVariant(_attention, _multihead)
"""What the entry point `moba` of the group `dilated.attention` names."""
