"""A model and its loss as one module."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from dilated_models.layers.context_parallel import ContextParallel
from dilated_models.longnet.language_model import LongNetLM


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
    ) -> Tensor:
        """Nats of all targets together.

        Args:
            inputs: `(T,)` tokens of packed windows; with `context_parallel`, those of this rank.
            targets: `(T,)`, of the same tokens; `NO_TARGET` where there is none.
            cu_seqlens: Of the packed windows; with `context_parallel`, of all ranks together.
            context_parallel: As for `LongNetLM`.
        """
        logits = self.model(inputs, cu_seqlens=cu_seqlens, context_parallel=context_parallel)
        return cross_entropy(logits.float(), targets, reduction="sum")
