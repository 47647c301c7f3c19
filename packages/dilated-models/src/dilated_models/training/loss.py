"""A model and its loss as one module."""

from __future__ import annotations

from torch import Tensor, nn

from dilated_models.layers.context_parallel import ContextParallel
from dilated_models.longnet.language_model import LongNetLM
from dilated_models.text.windows import NO_TARGET


class WithLoss(nn.Module):
    """A model and its loss as one module, which DDP and FSDP wrap.

    Inside its forward, FSDP has put all weights together, that of the output layer too.

    Args:
        model: The model.
    """

    def __init__(self, model: LongNetLM) -> None:
        super().__init__()
        self.model = model

    def forward(
        self,
        inputs: Tensor,
        targets: Tensor,
        cu_seqlens: Tensor,
        context_parallel: ContextParallel | None = None,
        *,
        count: int | None = 1,
    ) -> Tensor:
        """Nats of all targets together, divided by a count; no more than a chunk of logits exists.

        Args:
            inputs: `(T,)` tokens of packed windows; with `context_parallel`, those of this rank.
            targets: `(T,)`, of the same tokens; `NO_TARGET` where there is none.
            cu_seqlens: Of the packed windows; with `context_parallel`, of all ranks together.
            context_parallel: As for `LongNetLM`.
            count: The targets of the whole batch, for its mean loss. None: `(T,)`, the nats of each
                target, 0 where there is none.
        """
        return self.model.loss(
            inputs,
            targets,
            cu_seqlens=cu_seqlens,
            context_parallel=context_parallel,
            ignore_index=NO_TARGET,
            reduction="none" if count is None else "mean",
            count=count,
        )
