"""The module whose branches follow the length of each call."""

from __future__ import annotations

import torch
from torch import nn

from dilated_core.attention import dilated_attention
from dilated_core.checks import check_integer
from dilated_core.modules.config import DilatedAttentionConfig
from dilated_core.pattern.branches import DilatedPattern, HeadOffsets, Padding
from dilated_core.pattern.ladder import select_segments


class DynamicDilatedAttention(nn.Module):
    """Dilated attention whose branches `select_segments` chooses for the length of each call.

    It has no parameters, makes no modules, and looks at nothing but shapes and dtypes, so equal
    inputs have equal results on every machine.

    Args:
        first_segment_length: w₀, in positions, as in `select_segments`.
        growth: Ratio of neighbouring branches' lengths and rates, as there.
        keep_every_position: Whether rates stop at the number of heads, as there.
        memory_budget: Bytes of the keys and values that one query may see, as there.
        head_offsets: `"interleaved"` or `"blocked"`, see `DilatedPattern`.
        padding: `"masked"` or `"attended"`, see `DilatedPattern`.
        scale: Factor of the scores; 1/√head_dim if None.
        dropout: Probability of dropping each attention probability in training mode.
        max_workspace_bytes: Limit of temporary memory, see `dilated_attention`.
        backend: `"auto"` or the name of a backend.

    Raises:
        TypeError, ValueError: As `select_segments` and `DilatedAttention` do.

    Example:
        >>> attention = DynamicDilatedAttention(first_segment_length=16)
        >>> q = k = v = torch.randn(1, 50, 4, 8)
        >>> attention(q, k, v, is_causal=True).shape
        torch.Size([1, 50, 4, 8])
        >>> attention.pattern_for(q, k).branches[-1]
        Branch(segment_length=64, dilation_rate=4)
    """

    def __init__(
        self,
        *,
        first_segment_length: int = 2048,
        growth: int = 2,
        keep_every_position: bool = False,
        memory_budget: int | None = None,
        head_offsets: HeadOffsets = "interleaved",
        padding: Padding = "masked",
        scale: float | None = None,
        dropout: float = 0.0,
        max_workspace_bytes: int | None = None,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        # Checks both groups of options now rather than at the first call.
        select_segments(1, 1, first_segment_length=first_segment_length, growth=growth)
        if memory_budget is not None:
            check_integer("memory_budget", memory_budget, at_least=1)
        config = DilatedAttentionConfig(
            head_offsets=head_offsets,
            padding=padding,
            scale=scale,
            dropout=dropout,
            max_workspace_bytes=max_workspace_bytes,
            backend=backend,
        )
        self.first_segment_length, self.growth = first_segment_length, growth
        self.keep_every_position, self.memory_budget = keep_every_position, memory_budget
        self.head_offsets: HeadOffsets = config.head_offsets
        self.padding: Padding = config.padding
        self.max_workspace_bytes = config.max_workspace_bytes
        self.scale, self.dropout, self.backend = config.scale, config.dropout, config.backend

    def pattern_for(self, q: torch.Tensor, k: torch.Tensor) -> DilatedPattern:
        """The pattern that a call with q `(B, S, H, D)` and k `(B, S, H_kv, D)` uses."""
        for name, x in (("q", q), ("k", k)):
            if x.dim() != 4:
                raise ValueError(
                    f"{name} has shape {tuple(x.shape)}; it must have the four dimensions "
                    f"(batch, sequence, heads, head_dim)."
                )
        segments = select_segments(
            max(1, q.shape[1]),
            max(1, q.shape[2]),
            num_kv_heads=max(1, k.shape[2]),
            head_dim=max(1, k.shape[3]),
            dtype=k.dtype,
            first_segment_length=self.first_segment_length,
            growth=self.growth,
            keep_every_position=self.keep_every_position,
            memory_budget=self.memory_budget,
        )
        return DilatedPattern(*segments, head_offsets=self.head_offsets, padding=self.padding)

    def forward(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        is_causal: bool = False,
        *,
        key_padding_mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """`(B, S, H, D)` q, `(B, S, H_kv, D)` k, v -> `(B, S, H, D)`; see `dilated_attention`.

        There is no `cu_seqlens`: each document of a packed batch has a length of its own, and one
        choice for all would give it another result than it has alone.
        """
        return dilated_attention(
            q,
            k,
            v,
            self.pattern_for(q, k),
            is_causal=is_causal,
            scale=self.scale,
            dropout_p=self.dropout if self.training else 0.0,
            key_padding_mask=key_padding_mask,
            max_workspace_bytes=self.max_workspace_bytes,
            backend=self.backend,
        )

    def extra_repr(self) -> str:
        """The options that differ from their defaults, for `repr`."""
        parts = [f"first_segment_length={self.first_segment_length}, growth={self.growth}"]
        defaults = {"keep_every_position": False, "memory_budget": None, "scale": None}
        defaults |= {"head_offsets": "interleaved", "padding": "masked", "dropout": 0.0}
        defaults |= {"max_workspace_bytes": None, "backend": "auto"}
        for name, default in defaults.items():
            if getattr(self, name) != default:
                parts.append(f"{name}={getattr(self, name)!r}")
        return ", ".join(parts)
