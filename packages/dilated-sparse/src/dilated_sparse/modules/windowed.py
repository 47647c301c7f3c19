"""Windowed dilated attention as a module without parameters."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Never, get_args

import torch
from dilated_core import DilatedAttentionConfig
from dilated_core.checks import answers_names, check_choice, check_integer, set_checked
from dilated_core.modules.config import FORWARD_ARGUMENTS
from dilated_core.modules.options import check_forward_names, from_options, show_options
from torch import nn

from dilated_sparse.windowed.attention import windowed_dilated_attention
from dilated_sparse.windowed.plan import Overlap


@answers_names(FORWARD_ARGUMENTS)
@dataclass(frozen=True, kw_only=True)
class WindowedDilatedAttentionConfig(DilatedAttentionConfig):
    """What `WindowedDilatedAttention` is built from.

    The other options are those of `dilated_core.DilatedAttentionConfig`, but for
    `max_workspace_bytes`, which must be None.

    Attributes:
        window: W, in positions: a causal query sees its last W keys.
        overlap: How often a pair counts that is in the window and in a branch, see
            `windowed_dilated_attention`.

    Raises:
        TypeError, ValueError: As for `DilatedAttentionConfig`, or if the window is below 1.
    """

    window: int = 256
    overlap: Overlap = "once"

    def __post_init__(self) -> None:
        DilatedAttentionConfig.__post_init__(self)
        set_checked(self, window=check_integer("window", self.window, at_least=1))
        check_choice("overlap", self.overlap, get_args(Overlap))
        if self.max_workspace_bytes is not None:
            raise ValueError(
                f"max_workspace_bytes is {self.max_workspace_bytes}; windowed attention has no "
                f"limit of its workspace, so leave it out."
            )


@dataclass(frozen=True)
class WindowedDilatedAttentionArguments(WindowedDilatedAttentionConfig):
    """The signature of `WindowedDilatedAttention`: branches and window come first."""

    segment_lengths: Sequence[int] = field()
    dilation_rates: Sequence[int] = field()
    window: int = field()


class WindowedDilatedAttention(nn.Module):
    """`windowed_dilated_attention` with its options as a module without parameters.

    Args:
        config: A `WindowedDilatedAttentionConfig`. Or, instead of it, its options by name, which
            that class explains; `segment_lengths`, `dilation_rates` and `window` are required, and
            the first two may be positional.

    Raises:
        TypeError, ValueError: As `WindowedDilatedAttentionConfig` does.

    Example:
        >>> attention = WindowedDilatedAttention([16, 64], [1, 4], window=8)
        >>> q = k = v = torch.randn(1, 100, 4, 16)
        >>> attention(q, k, v, is_causal=True).shape
        torch.Size([1, 100, 4, 16])
    """

    @from_options(
        WindowedDilatedAttentionArguments,
        elsewhere=FORWARD_ARGUMENTS,
        config=WindowedDilatedAttentionConfig,
    )
    def __init__(self, config: WindowedDilatedAttentionConfig) -> None:
        super().__init__()
        self.config = config
        self.pattern = config.pattern

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
        """`(B, S, H, D)` q, `(B, S, H_kv, D)` k, v -> `(B, S, H, D)`."""
        check_forward_names(self, unknown, FORWARD_ARGUMENTS, self.config)
        config = self.config
        return windowed_dilated_attention(
            q,
            k,
            v,
            self.pattern,
            config.window,
            is_causal,
            config.scale,
            overlap=config.overlap,
            dropout_p=config.dropout if self.training else 0.0,
            key_padding_mask=key_padding_mask,
            cu_seqlens=cu_seqlens,
            head_range=config.head_range,
            backend=config.backend,
        )

    def extra_repr(self) -> str:
        """The branches, the window and the options that differ from their defaults, for `repr`."""
        return show_options(self.config, "segment_lengths", "dilation_rates", "window")
