"""The feed-forward half of a MAGNETO block."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, relu

from dilated_models.config import Activation


class FeedForwardOptions(Protocol):
    """What a `FeedForward` reads of the config of a model."""

    @property
    def d_model(self) -> int:
        """Width of inputs and outputs."""
        ...

    @property
    def dim_feedforward(self) -> int:
        """Width in between."""
        ...

    @property
    def activation(self) -> Activation:
        """The activation's name."""
        ...

    @property
    def activation_dropout(self) -> float:
        """Probability of dropping a value behind the activation."""
        ...

    @property
    def layer_norm_eps(self) -> float:
        """Of the LayerNorm."""
        ...

    @property
    def gamma_init(self) -> float:
        """Gain of the initial weights, unless another one is given."""
        ...


class FeedForward(nn.Module):
    """fc1, activation, dropout, LayerNorm, fc2: MAGNETO's sub-LayerNorm (arXiv 2210.06423, sec. 2).

    Both weights are drawn with Xavier's uniform rule and scaled by γ; biases are zero.

    Args:
        config: Of the model.
        gamma_init: γ; that of the config if None.
        device: Of the parameters.
        dtype: Of the parameters.
    """

    def __init__(
        self,
        config: FeedForwardOptions,
        *,
        gamma_init: float | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.activation = config.activation
        self.gamma_init = config.gamma_init if gamma_init is None else gamma_init
        inner, eps = config.dim_feedforward, config.layer_norm_eps
        self.fc1 = nn.Linear(config.d_model, inner, device=device, dtype=dtype)
        self.layer_norm = nn.LayerNorm(inner, eps=eps, device=device, dtype=dtype)
        self.dropout = nn.Dropout(config.activation_dropout)
        self.fc2 = nn.Linear(inner, config.d_model, device=device, dtype=dtype)
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
        """The one choice that is not a submodule."""
        return f"activation={self.activation!r}"
