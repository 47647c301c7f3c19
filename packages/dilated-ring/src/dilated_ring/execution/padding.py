"""Masks of keys with which blocks would begin elsewhere than on one device."""

from __future__ import annotations

import torch

from dilated_ring.plan.blocks import Blocks, BlocksByLength
from dilated_ring.transport.errors import DisagreementError


def check_padding(blocks: Blocks | BlocksByLength, hidden: torch.Tensor) -> None:
    """Refuse masks with which one device would not count blocks from the first position.

    Args:
        blocks: The pattern of the call.
        hidden: `(B, S)`, the mask of all positions.

    Raises:
        DisagreementError: If a batch row hides its first position and not all; or, where each
            length has a pattern, its last one. Every rank raises this alike.
    """
    if not hidden.numel():
        return
    sees = ~hidden.all(1)
    if bool((hidden[:, 0] & sees).any()):
        raise DisagreementError(
            "key_padding_mask hides the first position of a batch row. One device counts the "
            "blocks of this row from its first visible key; ranks count from position 0. Put the "
            "padding behind the sequences, or pack them with cu_seqlens."
        )
    if isinstance(blocks, BlocksByLength) and bool((hidden[:, -1] & sees).any()):
        raise DisagreementError(
            "key_padding_mask hides the last position of a batch row, and the pattern follows the "
            "length: one device gives this row the pattern of its visible length. Pass a pattern "
            "for the whole length, or pack the sequences with cu_seqlens."
        )
