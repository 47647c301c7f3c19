"""Move each sequence so that its first real token is at position 0, and back.

Blocks are counted from position 0. Padding before a sequence would shift their borders, so a padded
sequence would select other blocks than the same sequence alone.
"""

from __future__ import annotations

from typing import NamedTuple

import torch


class Anchor(NamedTuple):
    """How far each sequence of a batch is moved.

    Attributes:
        positions: `(B, S)` int64, where position s of the moved sequence comes from.
        back: `(B, S)` int64, the inverse.
        is_outside: `(B, S)` bool, padding before the first real token and behind the last.
    """

    positions: torch.Tensor
    back: torch.Tensor
    is_outside: torch.Tensor

    @classmethod
    def of_mask(cls, hidden: torch.Tensor) -> Anchor:
        """The anchor of `hidden` `(B, S)` bool, True for padding."""
        S = hidden.shape[1]
        visible = (~hidden).to(torch.uint8)
        # argmax returns the first of equal values: 0 if all is padding.
        first = visible.argmax(1, keepdim=True)
        last = S - 1 - visible.flip(1).argmax(1, keepdim=True)
        s = torch.arange(S, device=hidden.device)
        is_outside = (s < first) | (s > last) | (visible.amax(1, keepdim=True) == 0)
        return cls((s + first) % S, (s - first) % S, is_outside)

    def move(self, x: torch.Tensor) -> torch.Tensor:
        """`(B, S, …)`, padding behind the sequence."""
        return _taken(x, self.positions)

    def restore(self, x: torch.Tensor) -> torch.Tensor:
        """The inverse of `move`."""
        return _taken(x, self.back)


def _taken(x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    return x[torch.arange(x.shape[0], device=x.device).unsqueeze(1), positions]
