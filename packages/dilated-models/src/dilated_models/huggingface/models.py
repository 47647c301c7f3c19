"""LongNetLM as models of transformers: files, Auto classes, Trainer, `generate`."""

from __future__ import annotations

from typing import Any, cast

import torch
from dilated_core import linear_cross_entropy
from torch import Tensor
from torch.nn.functional import pad
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, GenerationMixin
from transformers import PreTrainedModel as _PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

from dilated_models.huggingface.bounded_cache import CACHE_NAME, LongNetCache
from dilated_models.huggingface.columns import check_one_text, find_documents
from dilated_models.huggingface.configuration import LongNetPretrainedConfig
from dilated_models.huggingface.refusals import check_arguments, check_mask
from dilated_models.longnet.generation_cache import GenerationCache
from dilated_models.longnet.language_model import LongNetLM


class LongNetPreTrainedModel(_PreTrainedModel):
    """What `LongNetModel` and `LongNetForCausalLM` share: one `LongNetLM`, named `lm`.

    Both have the same weights, so each loads what the other has saved.
    """

    config: LongNetPretrainedConfig
    config_class = LongNetPretrainedConfig
    base_model_prefix = ""
    _no_split_modules = ["SelfAttentionBlock"]  # noqa: RUF012
    _tied_weights_keys = {"lm.output.weight": "lm.embedding.weight"}  # noqa: RUF012

    def __init__(self, config: LongNetPretrainedConfig) -> None:
        super().__init__(config)
        self.lm = LongNetLM(config.longnet)
        self.post_init()

    def _init_weights(self, module: torch.nn.Module) -> None:
        """LongNetLM has drawn its weights, and `from_pretrained` refuses to draw any."""

    @classmethod
    def from_pretrained(cls, *arguments: Any, **options: Any) -> Any:
        """As `PreTrainedModel.from_pretrained`, but strict.

        Raises:
            ValueError: If a weight is missing, unknown or of another shape.
        """
        returns_info = options.pop("output_loading_info", False)
        load = cast(Any, super().from_pretrained)
        model, info = load(*arguments, output_loading_info=True, **options)
        problems = {name: sorted(map(str, found)) for name, found in info.items() if found}
        if problems:
            raise ValueError(
                f"the weights do not fit the config: {problems}; load them with the config that "
                f"they were saved with."
            )
        return (model, info) if returns_info else model

    def get_input_embeddings(self) -> Any:
        """The embedding."""
        return self.lm.embedding

    def set_input_embeddings(self, value: Any) -> None:
        """Replace the embedding."""
        self.lm.embedding = value

    def _hidden(
        self, input_ids: Tensor | None, mask: object, position_ids: Tensor | None, given: Any
    ) -> Tensor:
        """`(B, S, d_model)`, 0 for padding; documents and padded rows are as if alone."""
        tokens = _check_tokens(input_ids, given)
        B, n = tokens.shape
        packed = find_documents(position_ids, _visible(mask, B, n), B, n)
        if packed is None:
            return self.lm.hidden_states(tokens)
        at = packed.rows, packed.columns
        hidden = self.lm.hidden_states(tokens[at], cu_seqlens=packed.cu_seqlens)
        return hidden.new_zeros(B, n, hidden.shape[-1]).index_put(at, hidden)


class LongNetModel(LongNetPreTrainedModel):
    """`LongNetLM` up to its last LayerNorm; see `LongNetForCausalLM` for its arguments."""

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        **given: Any,
    ) -> BaseModelOutputWithPast:
        """Return `last_hidden_state` `(B, S, d_model)`; it keeps no cache."""
        if given.pop("use_cache", None):
            raise ValueError(
                "use_cache is True; LongNetModel has no cache, LongNetForCausalLM has."
            )
        hidden = self._hidden(input_ids, attention_mask, position_ids, given)
        return BaseModelOutputWithPast(last_hidden_state=cast(Any, hidden))


class LongNetForCausalLM(LongNetPreTrainedModel, GenerationMixin):
    """`LongNetLM` as a model of transformers, with `generate` in bounded memory.

    Args:
        config: A `LongNetPretrainedConfig`.

    Example:
        >>> config = LongNetPretrainedConfig(d_model=32, nhead=4, num_decoder_layers=2,
        ...     dim_feedforward=64, segment_lengths=[8, 16], dilation_rates=[1, 2])
        >>> model = LongNetForCausalLM(config)
        >>> prompt = torch.tensor([list(b"def ")])
        >>> model.generate(prompt, max_new_tokens=5, do_sample=False).shape
        torch.Size([1, 9])
    """

    def get_output_embeddings(self) -> Any:
        """The output layer."""
        return self.lm.output

    def set_output_embeddings(self, new_embeddings: Any) -> None:
        """Replace the output layer."""
        self.lm.output = new_embeddings

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        """False: `forward` makes the cache, which keeps less than a DynamicCache."""
        return False

    def init_continuous_batching(self, *_: Any, **__: Any) -> Any:
        """Refused: its pages hold the keys of all tokens, and take most of the memory at once."""
        raise ValueError(
            "LongNetForCausalLM has a cache of its own, which continuous batching cannot page; "
            "call generate with padded prompts, or dilated_models.generate_batch."
        )

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: LongNetCache | None = None,
        past_key_values: LongNetCache | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int = 0,
        **given: Any,
    ) -> CausalLMOutputWithPast:
        """Score every next token.

        Args:
            input_ids: `(B, S)`.
            attention_mask: `(B, S)`, or with a cache `(B, columns so far + S)`; 0 for padding, on
                either side. A padded row is as if alone.
            position_ids: `(1, S)` or `(B, S)`, over tokens consecutive from 0; a restart at 0
                begins a document, which is as if alone. Gaps are refused.
            cache, past_key_values: Two names of what a call with `use_cache=True` has returned.
            labels: `(B, S)`, −100 where there is no target; shifted here. The loss never holds the
                logits of all tokens, and in training mode the output has none, unless
                `logits_to_keep` is given.
            use_cache: Whether to return a cache; not if None.
            logits_to_keep: How many of the last columns get logits; 0: all. With a cache 1.

        Raises:
            TypeError, ValueError: If something cannot be honoured.
        """
        cache = past_key_values if cache is None else cache
        if use_cache or cache is not None:
            if labels is not None or (
                logits_to_keep != 1 and _check_tokens(input_ids, {}).shape[1] > 1
            ):
                raise ValueError(
                    "a call with a cache returns the logits of the last column only, without "
                    "gradients; give logits_to_keep=1 and no labels, or use_cache=False."
                )
            logits, cache = self._continue(input_ids, attention_mask, position_ids, cache, given)
            held: dict[str, Any] = {CACHE_NAME: cache}
            return CausalLMOutputWithPast(logits=cast(Any, logits), **held)
        count = given.get("num_items_in_batch")
        hidden = self._hidden(input_ids, attention_mask, position_ids, given)
        loss = logits = None
        if labels is None or not self.training or logits_to_keep or self._has_own_loss:
            logits = self.lm.output(hidden[:, -logits_to_keep:])
        if labels is not None and self._has_own_loss:
            loss = cast(Any, self.loss_function)(
                logits, labels, vocab_size=self.config.num_tokens, num_items_in_batch=count
            )
        elif labels is not None:
            next_labels = pad(labels, (0, 1), value=-100)[:, 1:].to(hidden.device)
            loss = linear_cross_entropy(hidden, self.lm.output.weight, next_labels, count=count)
        return CausalLMOutputWithPast(loss=cast(Any, loss), logits=cast(Any, logits))

    @property
    def _has_own_loss(self) -> bool:
        """Whether the user has set `loss_function`, which is given the logits of all tokens."""
        return "_loss_function" in self.__dict__

    def _continue(
        self,
        input_ids: Tensor | None,
        mask: object,
        position_ids: Tensor | None,
        cache: LongNetCache | None,
        given: Any,
    ) -> tuple[Tensor, LongNetCache]:
        """Logits `(B, 1, num_tokens)` of the last token of each row, and the cache."""
        tokens = _check_tokens(input_ids, given)
        B, n = tokens.shape
        if cache is None:
            cache = LongNetCache(GenerationCache(self.lm, batch_size=B))
        if not isinstance(cache, LongNetCache):
            raise TypeError(
                f"cache is a {type(cache).__name__}; it must be what a call with use_cache=True "
                f"returned, a LongNetCache."
            )
        past = cache.columns
        visible = _visible(mask, B, past + n)
        check_one_text(position_ids, visible, B, past, n)
        lengths = None
        if visible is not None:
            new = visible[:, past:]
            lengths = new.sum(-1)
            # Tokens first, as LongNetLM has them.
            tokens = tokens.gather(1, (~new).to(torch.int8).argsort(dim=1, stable=True))
        logits = self.lm(tokens, cache=cache.state, lengths=lengths)
        cache.columns += n
        return logits, cache


def _check_tokens(input_ids: Tensor | None, given: dict[str, Any]) -> Tensor:
    check_arguments(given)
    if not isinstance(input_ids, Tensor) or input_ids.ndim != 2:
        raise ValueError(
            "input_ids must be a tensor of shape (batch, columns); inputs_embeds are not taken, "
            "because LongNetLM embeds tokens itself."
        )
    return input_ids


def _visible(mask: object, B: int, columns: int) -> Tensor | None:
    visible = check_mask(mask)
    if visible is not None and visible.shape != (B, columns):
        raise ValueError(
            f"attention_mask has shape {tuple(visible.shape)}; it must be {(B, columns)}, one "
            f"value for each column, those in the cache too."
        )
    return None if visible is None or bool(visible.all()) else visible


AutoConfig.register("longnet", LongNetPretrainedConfig, exist_ok=True)
AutoModel.register(LongNetPretrainedConfig, LongNetModel, exist_ok=True)
AutoModelForCausalLM.register(LongNetPretrainedConfig, LongNetForCausalLM, exist_ok=True)
