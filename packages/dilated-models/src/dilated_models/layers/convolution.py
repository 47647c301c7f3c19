"""The depthwise causal convolution that `key_conv` adds to the input of an attention."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from dilated_models.config import LongNetConfig

_STD = 0.3


def add_causal_convolution(
    x: Tensor,
    weight: Tensor,
    *,
    before: Tensor | None = None,
    positions: Tensor | None = None,
    rows_before: Callable[[Tensor, int], Tensor] | None = None,
) -> Tensor:
    """X plus its depthwise causal convolution: y_t = x_t + Σ_i weight[:, 0, −1−i] · x_{t−i}.

    Args:
        x: `(..., S, E)`.
        weight: `(E, 1, width)`, as `nn.Conv1d(E, E, width, groups=E)` stores it.
        before: `(..., width − 1, E)`, the inputs before `x`, for a text that comes in parts; None
            means zeros, the beginning of a text.
        positions: `(S,)`, integer, the distance of each row from the start of its document, for
            packed documents: inputs of an earlier document then count as zeros. None means that all
            rows of `x` belong to one document.
        rows_before: Instead of `before` and `positions`, for a sequence that is spread over ranks:
            maps `x` and a lag to the row `lag` before each row of `x`, or zeros where there is
            none.

    Returns:
        `(..., S, E)`.

    Example:
        >>> x = torch.randn(1, 10, 4)
        >>> weight = torch.randn(4, 1, 3)
        >>> whole = add_causal_convolution(x, weight)
        >>> part = add_causal_convolution(x[:, 6:], weight, before=x[:, 4:6])
        >>> torch.allclose(whole[:, 6:], part)
        True
    """
    # A sum of shifted products takes half the time of conv1d on the CPU, forward and backward,
    # at widths of 4.
    width, seq_len = weight.shape[-1], x.shape[-2]
    if rows_before is not None:
        y = x
        for lag in range(width):
            shifted = rows_before(x, lag) if lag else x
            y = torch.addcmul(y, shifted, weight[:, 0, width - 1 - lag])
        return y
    if before is None:
        before = x.new_zeros(*x.shape[:-2], width - 1, x.shape[-1])
    extended = torch.cat((before, x), dim=-2)
    y = x
    for lag in range(width):
        shifted = extended.narrow(-2, width - 1 - lag, seq_len)
        if positions is not None and lag:
            shifted = shifted.masked_fill((positions < lag)[:, None], 0)
        y = torch.addcmul(y, shifted, weight[:, 0, width - 1 - lag])
    return y


class CausalConvolution(nn.Module):
    """x + convolution(x), each channel on its own, over a position and the `key_conv − 1` before.

    Not part of LongNet. A head that selects every r-th position does not see the token beside a key
    that it matches; the convolution puts neighbours into each key. Published evidence for it:
    convolved keys in block-sparse attention (FlashMoBA, arXiv 2511.11571) and Canon layers
    (arXiv 2512.17351). The weights are drawn with a standard deviation of 0.3: large enough for
    neighbours to count from the first step, small enough for a position to count most.

    It looks back only, also where attention is not causal.

    Args:
        config: Of the model; its `key_conv` is at least 1.
        device: Of the weight.
        dtype: Of the weight.
    """

    def __init__(
        self,
        config: LongNetConfig,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        shape = (config.d_model, 1, config.key_conv)
        self.weight = nn.Parameter(torch.empty(shape, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the weight anew."""
        nn.init.normal_(self.weight, std=_STD)

    def forward(
        self,
        x: Tensor,
        *,
        before: Tensor | None = None,
        positions: Tensor | None = None,
        rows_before: Callable[[Tensor, int], Tensor] | None = None,
    ) -> Tensor:
        """Map `(..., S, d_model)` to the same shape; see `add_causal_convolution`."""
        return add_causal_convolution(
            x, self.weight, before=before, positions=positions, rows_before=rows_before
        )

    def extra_repr(self) -> str:
        """The width."""
        return f"width={self.weight.shape[-1]}"
