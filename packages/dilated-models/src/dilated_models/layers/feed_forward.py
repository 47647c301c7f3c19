"""The feed-forward half of a MAGNETO block."""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, relu

Activation = Literal["relu", "gelu"]
ACTIVATIONS: tuple[str, ...] = get_args(Activation)


class FeedForward(nn.Module):
    """fc1, activation, LayerNorm, fc2: MAGNETO's sub-LayerNorm (arXiv 2210.06423, section 2).

    Both weights are drawn with Xavier's uniform rule and scaled by `gamma_init`; biases are zero.

    Args:
        d_model: Width of the input and output.
        dim_feedforward: Width between fc1 and fc2.
        dropout: Probability of dropping an activation between fc1 and fc2.
        activation: `"relu"` or `"gelu"` (the exact one, by erf).
        layer_norm_eps: Added to the variance in the LayerNorm.
        gamma_init: Gain of both weights at initialisation.
        device: Of the parameters.
        dtype: Of the parameters.
    """

    def __init__(
        self,
        d_model: int,
        dim_feedforward: int,
        *,
        dropout: float = 0.0,
        activation: Activation = "relu",
        layer_norm_eps: float = 1e-5,
        gamma_init: float = 1.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if activation not in ACTIVATIONS:
            raise ValueError(f"activation must be one of {ACTIVATIONS}, got {activation!r}.")
        self.activation = activation
        self.gamma_init = gamma_init
        self.fc1 = nn.Linear(d_model, dim_feedforward, device=device, dtype=dtype)
        self.layer_norm = nn.LayerNorm(
            dim_feedforward, eps=layer_norm_eps, device=device, dtype=dtype
        )
        self.dropout = nn.Dropout(dropout)
        self.fc2 = nn.Linear(dim_feedforward, d_model, device=device, dtype=dtype)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the weights anew."""
        for linear in (self.fc1, self.fc2):
            nn.init.xavier_uniform_(linear.weight, gain=self.gamma_init)
            nn.init.zeros_(linear.bias)
        self.layer_norm.reset_parameters()

    def forward(self, x: Tensor) -> Tensor:
        """Map `(..., d_model)` to the same shape, each position on its own."""
        hidden = self.fc1(x)
        hidden = relu(hidden) if self.activation == "relu" else gelu(hidden)
        return self.fc2(self.layer_norm(self.dropout(hidden)))

    def extra_repr(self) -> str:
        """Show the one choice that is not a submodule."""
        return f"activation={self.activation!r}"
