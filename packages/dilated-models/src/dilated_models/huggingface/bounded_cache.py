"""A `GenerationCache` as a cache of transformers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import Cache
from transformers.modeling_outputs import CausalLMOutputWithPast

from dilated_models.longnet.generation_cache import GenerationCache

# The name of the cache in calls and outputs of a model: transformers 5.24 has renamed it.
CACHE_NAME = (
    "cache" if "cache" in CausalLMOutputWithPast.__dataclass_fields__ else "past_key_values"
)


class LongNetCache(Cache):
    """What `LongNetForCausalLM` returns as its cache: of bounded memory, however long the text is.

    Args:
        state: The cache of the model, without tokens.
    """

    def __init__(self, state: GenerationCache) -> None:
        super().__init__(layers=[])
        self.state = state
        self.columns = 0

    def update(self, *_: Any, **__: Any) -> Any:
        """Refused: only layers of other models call it."""
        raise ValueError(
            "a LongNetCache is the cache of LongNetForCausalLM; another model with "
            "attn_implementation='dilated' takes a DilatedCache(model.config)."
        )

    @property
    def is_compileable(self) -> bool:
        """False: it branches on how many tokens it has."""
        return False

    @property
    def is_croppable(self) -> bool:
        """False: see `crop`."""
        return False

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Columns of tokens and padding so far."""
        return self.columns

    def get_max_length(self, layer_idx: int | None = None) -> int:
        """-1: no limit."""
        return -1

    def get_max_cache_shape(self, layer_idx: int = 0) -> int:
        """The same, by the name of transformers 5.23."""
        return -1

    def reset(self) -> None:
        """Forget all tokens."""
        self.state.reset()
        self.columns = 0

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Make row i continue as what row `beam_idx[i]` was."""
        self.state.reorder(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these rows."""
        self.state.reorder(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Make `repeats` rows of each."""
        self.state.reorder(torch.arange(self.state.batch_size).repeat_interleave(repeats))

    def crop(self, tokens_to_remove: int) -> None:
        """Refused: the keys before are gone."""
        raise ValueError(
            "a LongNetCache keeps no token that the next one does not see, so none can be taken "
            "back; generate without an assistant model, or with use_cache=False."
        )
