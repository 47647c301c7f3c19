"""What every transport refuses to carry, and how it counts what it carries."""

from __future__ import annotations

from collections.abc import Mapping

import torch


def check_messages(
    rank: int,
    size: int,
    sends: Mapping[int, torch.Tensor],
    receives: Mapping[int, torch.Tensor],
    step: str,
) -> None:
    """Refuse messages that no transport can carry.

    Raises:
        RuntimeError: If a message goes to or comes from `rank` itself or a rank outside the group,
            or a tensor is not contiguous: the plan is wrong, not the user.
    """
    for word, messages in (("to", sends), ("from", receives)):
        for peer, tensor in messages.items():
            if peer == rank or not 0 <= peer < size:
                raise RuntimeError(
                    f"{step}: rank {rank} has a message {word} rank {peer}. A message goes to "
                    f"another rank of the {size} ranks of the group."
                )
            if not tensor.is_contiguous():
                raise RuntimeError(
                    f"{step}: the message {word} rank {peer} at rank {rank} has shape "
                    f"{tuple(tensor.shape)} and strides {tensor.stride()}. Messages must be "
                    f"contiguous."
                )


def num_bytes(messages: Mapping[int, torch.Tensor]) -> int:
    """Bytes of the messages together."""
    return sum(tensor.numel() * tensor.element_size() for tensor in messages.values())
