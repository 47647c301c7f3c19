"""A cache of bounded memory for transformers models with `attn_implementation="dilated"`.

A layer of a transformers model calls `cache.update(k, v, layer_idx, kwargs=kwargs)` and then its
attention function with the same kwargs. A `DilatedCacheLayer` adds itself to these. The attention
function finds it there and attends from its `DecodingCache`, which also appends the new tokens.

B batch, n new columns, H heads, H_kv heads of k and v, D head_dim.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from dilated_core import DecodingCache, DilatedAttentionConfig, decode_step, decode_tokens
from torch import Tensor
from transformers import Cache, PreTrainedConfig
from transformers.cache_utils import CacheLayerMixin

from dilated_models.huggingface.attention import CACHE_LAYER
from dilated_models.huggingface.bounded_cache import CACHE_NAME
from dilated_models.huggingface.columns import check_one_text
from dilated_models.huggingface.registration import NAME


class DilatedCacheLayer(CacheLayerMixin):
    """What a `DilatedCache` keeps for one layer of the model.

    Args:
        config: Of the model.
        max_cache_len: As for `DilatedCache`.

    Attributes:
        state: The rows that later tokens can still see; None before the first token.
        columns: Columns of tokens and padding so far.
    """

    is_sliding = False
    supports_early_init = False

    def __init__(self, config: PreTrainedConfig, max_cache_len: int | None) -> None:
        super().__init__()
        self.config = config
        self.max_cache_len = max_cache_len
        self.state: DecodingCache | None = None
        self.columns = 0
        self._is_waiting = False

    def update(
        self, key_states: Tensor, value_states: Tensor, *_: Any, **given: Any
    ) -> tuple[Tensor, Tensor]:
        """Return the new keys and values as they are, and put this layer into `given["kwargs"]`.

        Raises:
            ValueError: If the attention function does not get these kwargs, or is another one.
        """
        arguments = given.get("kwargs")
        if arguments is None:
            raise ValueError(
                "this model does not hand the arguments of its attention to the cache, so a "
                "DilatedCache cannot serve it; use a DynamicCache, which keeps all tokens."
            )
        attention = getattr(self.config, "_attn_implementation", None)
        if attention != NAME:
            raise ValueError(
                f"the model has attn_implementation={attention!r}, which sees all tokens; a "
                f"DilatedCache keeps those that attn_implementation='dilated' sees. Call "
                f"model.set_attn_implementation('dilated'), or use a DynamicCache."
            )
        if self._is_waiting:
            raise ValueError(
                "the tokens of the last call did not reach this cache: the call ended with an "
                "error, or the model's attention is not 'dilated'; make a new cache."
            )
        self._is_waiting = True
        arguments[CACHE_LAYER] = self
        return key_states, value_states

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        position_ids: Tensor | None,
        visible: Tensor | None,
        attention: DilatedAttentionConfig,
        scale: float | None,
    ) -> Tensor:
        """Append n columns and attend from each.

        Args:
            q: `(B, n, H, D)`.
            k, v: `(B, n, H_kv, D)`, of the same columns.
            position_ids: `(1, n)` or `(B, n)`.
            visible: `(B, columns + n)` bool, or None: all are tokens.
            attention: Pattern and backend.
            scale: Factor of the scores.

        Returns:
            `(B, n, H, D)`, 0 for padding.

        Raises:
            ValueError: If positions do not continue the text, the pattern has changed, or a
                gradient is required.
        """
        if not self._is_waiting:
            raise ValueError(
                "this model attends more than once for each update of its cache, so a DilatedCache "
                "cannot serve it; use a DynamicCache, which keeps all tokens."
            )
        B, n, H, D = q.shape
        if visible is not None and visible.shape != (B, self.columns + n):
            raise ValueError(
                f"attention_mask has shape {tuple(visible.shape)}; it must be "
                f"{(B, self.columns + n)}, one value for each column, those in the cache too."
            )
        check_one_text(position_ids, visible, B, self.columns, n)
        if self.state is None:
            self.state = DecodingCache(
                attention.pattern,
                batch_size=B,
                num_heads=H,
                num_kv_heads=k.shape[2],
                head_dim=D,
                device=k.device,
                dtype=k.dtype,
                max_seq_len=self.max_cache_len,
            )
            self.is_initialized = True
        state = self.state
        if state.pattern != attention.pattern:
            raise ValueError(
                f"the pattern is {attention.pattern} and the cache has the tokens that "
                f"{state.pattern} sees; make a new DilatedCache for another pattern."
            )
        new = None if visible is None else visible[:, self.columns :]
        if new is not None and not bool(new.all()):
            # DecodingCache has the tokens of each row first, and padding behind them.
            order = (~new).to(torch.int8).argsort(dim=1, stable=True)[:, :, None, None]
            q, k, v = (x.take_along_dim(order, dim=1) for x in (q, k, v))
            counts = new.sum(-1)
            out = decode_tokens(
                q, k, v, state, lengths=counts, scale=scale, backend=attention.backend
            )
            out = out.take_along_dim(order.argsort(dim=1), dim=1)
        elif n == 1 and attention.backend == "auto":
            out = decode_step(q, k, v, state, scale=scale)
        else:
            out = decode_tokens(q, k, v, state, scale=scale, backend=attention.backend)
        self.columns += n
        self._is_waiting = False
        return out

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing: `attend` makes the memory, for the pattern of the model."""

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Columns of the mask: those before and the new ones; none is left out."""
        return self.columns + query_length, 0

    def get_seq_length(self) -> int:
        """Columns of tokens and padding so far."""
        return self.columns

    def get_max_length(self) -> int:
        """`max_cache_len`; -1: no limit."""
        return -1 if self.max_cache_len is None else self.max_cache_len

    def reset(self) -> None:
        """Forget all tokens, and the pattern."""
        self.state, self.columns, self._is_waiting = None, 0, False
        self.is_initialized = False

    def reorder_cache(self, beam_idx: Tensor | Sequence[int]) -> None:
        """Make row i continue as what row `beam_idx[i]` was."""
        if self.state is not None:
            self.state.reorder(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these rows."""
        self.reorder_cache(indices.nonzero().flatten() if indices.dtype == torch.bool else indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Make `repeats` rows of each."""
        if self.state is not None:
            self.reorder_cache(torch.arange(self.state.batch_size).repeat_interleave(repeats))

    def crop(self, tokens_to_remove: int) -> None:
        """Refused: the keys before are gone."""
        if tokens_to_remove:
            raise ValueError(
                "a DilatedCache keeps no token that the next one does not see, so none can be "
                "taken back; generate without an assistant model, or with a DynamicCache."
            )

    def offload(self) -> None:
        """Refused: the memory is small, and each step writes to it."""
        raise ValueError("a DilatedCache is not offloaded; its memory does not grow with the text.")


class DilatedCache(Cache):
    """Cache of a decoder with `attn_implementation="dilated"`, of bounded memory.

    It keeps the keys and values that later tokens can still see: per sequence, layer and head of k
    and v ⌈w/r⌉ rows for each branch and each of its offsets, however long the text is. Results are
    those of a `DynamicCache`. It is for inference, and one text in each row: prompts and parts of
    them, padded on either side, single tokens, and beams.

    Args:
        config: The model's config. All layers must have full attention.
        max_cache_len: Most tokens of a text, if known. Longer segments then need no more memory
            than this many tokens, and a token beyond is an error. None: any number.

    Attributes:
        layers: A `DilatedCacheLayer` for each layer.

    Raises:
        NotImplementedError: If transformers is older than 5.24.
        ValueError: If the model has layers without full attention.

    Example::

        model.set_attn_implementation("dilated")
        text = model.generate(prompt, cache=DilatedCache(model.config), max_new_tokens=100)
    """

    layers: list[DilatedCacheLayer]

    def __init__(self, config: PreTrainedConfig, *, max_cache_len: int | None = None) -> None:
        if CACHE_NAME != "cache":
            raise NotImplementedError(
                "a DilatedCache needs transformers 5.24 or newer: the models of 5.23 do not hand "
                "the arguments of their attention to cache.update. Use a DynamicCache, which "
                "keeps all tokens, or LongNetForCausalLM, whose own cache is bounded."
            )
        text: Any = config.get_text_config(decoder=True)
        others = set(getattr(text, "layer_types", None) or ()) - {"full_attention"}
        if others:
            raise ValueError(
                f"{type(config).__name__} has layers of {sorted(others)}; a DilatedCache is for "
                f"models whose layers all have full attention."
            )
        super().__init__(
            layers=[DilatedCacheLayer(text, max_cache_len) for _ in range(text.num_hidden_layers)]
        )

    @property
    def nbytes(self) -> int:
        """Bytes of all keys and values."""
        return sum(layer.state.nbytes for layer in self.layers if layer.state is not None)
