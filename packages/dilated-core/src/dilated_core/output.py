"""What attention returns: the pair that partial results are merged by."""

from __future__ import annotations

from typing import NamedTuple

import torch


class AttentionOutput(NamedTuple):
    """An attention result and the log of its softmax denominators.

    Attributes:
        out: `(B, S, H, D)`, in the dtype of the inputs; 0 where a query sees no key.
        lse: `(B, S, H)`, natural logarithm, float32 (float64 for float64 inputs); −inf where a
            query sees no key.
    """

    out: torch.Tensor
    lse: torch.Tensor
