"""Ring attention with the projections of a transformer layer."""

from __future__ import annotations

from dilated_core import MultiheadConfig, MultiheadDilatedAttention
from dilated_core.checks import check_choice
from dilated_core.modules.config import MULTIHEAD_ARGUMENTS
from dilated_core.modules.options import from_options

from dilated_ring.modules.config import (
    RingAttentionConfig,
    RingBlockSparseConfig,
    RingBlockSparseMultiheadArguments,
    RingMultiheadArguments,
)
from dilated_ring.modules.kinds import RING_KINDS, ring_of_kind
from dilated_ring.modules.ring import StandardRingAttention
from dilated_ring.sharding.group import Group


class RingMultiheadDilatedAttention(MultiheadDilatedAttention):
    """`MultiheadDilatedAttention` over a sequence that is cut over ranks.

    Each rank projects the positions that it holds, attends over all ranks, and projects the result:
    `(B, L, E)` in and out. Parameters, their names and `state_dict` are those of
    `MultiheadDilatedAttention`, so weights move between one device and a ring. Each rank's
    gradients of the parameters are the share of its positions: the sum over ranks is the gradient.

    Positions belong to the caller, as in `MultiheadDilatedAttention`. Rotary factors and ALiBi take
    those that `local_positions` returns, between `project` and `attend`::

        q, k, v = mha.project(x, x, x)
        rotation = rotation_at(local_positions("contiguous", seq_len), mha.head_dim)
        q = rotate(q, rotation.q_cos, rotation.q_sin)
        k = rotate(k, rotation.k_cos, rotation.k_sin)
        y = mha.combine(mha.attend(q, k, v, is_causal=True))

    A causal `attn_mask` is that of the local positions, `(L, L)`; `is_causal=True` means the whole
    sequence.

    Args:
        multihead_config, attention_config: A `MultiheadConfig` and a `RingAttentionConfig`. Or,
            instead of them, their options by name; `embed_dim`, `num_heads`, `segment_lengths` and
            `dilation_rates` are required, and the first two may be positional.
        kind: Which module attends, as in `create_ring_attention`.
        group: The ranks that share the sequence, see `ring_dilated_attention`.

    Raises:
        TypeError, ValueError: As the two configs and `StandardRingAttention` do.

    Example:
        >>> mha = RingMultiheadDilatedAttention(
        ...     32, 4, segment_lengths=[8, 32], dilation_rates=[1, 4], ring_size=2
        ... )
        >>> x = torch.randn(2, 50, 32)
        >>> mha(x, x, x, is_causal=True).shape
        torch.Size([2, 50, 32])
    """

    attention: StandardRingAttention  # pyright: ignore[reportIncompatibleVariableOverride]

    @from_options(
        RingMultiheadArguments,
        elsewhere=MULTIHEAD_ARGUMENTS,
        multihead_config=MultiheadConfig,
        attention_config=RingAttentionConfig,
    )
    def __init__(  # pyright: ignore[reportIncompatibleVariableOverride] - it has more options
        self,
        multihead_config: MultiheadConfig,
        attention_config: RingAttentionConfig,
        *,
        kind: str = "auto",
        group: Group | tuple[Group, Group] = None,
    ) -> None:
        check_choice("kind", kind, tuple(RING_KINDS))
        super().__init__(multihead_config, attention_config)
        self.attention = ring_of_kind(kind, attention_config, group)


class RingBlockSparseMultiheadAttention(RingMultiheadDilatedAttention):
    """`RingMultiheadDilatedAttention` with `RingBlockSparseAttention` inside.

    Args:
        multihead_config, attention_config: A `MultiheadConfig` and a `RingBlockSparseConfig`. Or,
            instead of them, their options by name; `embed_dim` and `num_heads` are required and may
            be positional.
        group: The ranks that share the sequence, see `ring_dilated_attention`.

    Raises:
        TypeError, ValueError: As the two configs and `RingBlockSparseAttention` do.

    Example:
        >>> mha = RingBlockSparseMultiheadAttention(
        ...     32, 4, segment_lengths=[16], dilation_rates=[1], block_size=8, ring_size=2
        ... )
        >>> x = torch.randn(2, 50, 32)
        >>> mha(x, x, x, is_causal=True).shape
        torch.Size([2, 50, 32])
    """

    @from_options(
        RingBlockSparseMultiheadArguments,
        elsewhere=MULTIHEAD_ARGUMENTS,
        multihead_config=MultiheadConfig,
        attention_config=RingBlockSparseConfig,
    )
    def __init__(  # pyright: ignore[reportIncompatibleVariableOverride] - it has more options
        self,
        multihead_config: MultiheadConfig,
        attention_config: RingBlockSparseConfig,
        *,
        group: Group | tuple[Group, Group] = None,
    ) -> None:
        super().__init__(multihead_config, attention_config, kind="block_sparse", group=group)
