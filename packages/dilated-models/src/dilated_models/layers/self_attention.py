"""Dilated self-attention whose queries and keys know their positions."""

from __future__ import annotations

from dilated_core import MultiheadDilatedAttention
from dilated_core.positions.rotary import Rotation, rotate
from torch import Tensor


class DilatedSelfAttention(MultiheadDilatedAttention):
    """Project, rotate q and k, attend, LayerNorm, project out.

    Everything but the rotation is `dilated_core.MultiheadDilatedAttention`, whose arguments this
    class takes. Rotation comes before the pattern selects positions, so each row is turned by its
    absolute position whatever branch picks it up.
    """

    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, x: Tensor, rotation: Rotation | None = None, *, is_causal: bool = False
    ) -> Tensor:
        """Attend within `x`.

        Args:
            x: `(B, S, E)`.
            rotation: Of the S positions; None leaves q and k as they are.
            is_causal: Whether a position sees no later one.

        Returns:
            `(B, S, E)`.
        """
        q, k, v = self.project(x, x, x)
        if rotation is not None:
            q = rotate(q, rotation.q_cos, rotation.q_sin)
            k = rotate(k, rotation.k_cos, rotation.k_sin)
        return self.combine(self.attend(q, k, v, is_causal=is_causal))
