"""A `LongNetConfig` as a config of transformers."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

from transformers import PreTrainedConfig

from dilated_models.config import LongNetConfig

_FIELDS = tuple(field.name for field in dataclasses.fields(LongNetConfig))


class LongNetPretrainedConfig(PreTrainedConfig):
    """The config of `LongNetForCausalLM` and `LongNetModel`: the fields of `LongNetConfig`.

    The names that transformers has for some of them work too: `vocab_size`, `hidden_size`,
    `num_hidden_layers`, `num_attention_heads`, `num_key_value_heads`, `intermediate_size`,
    `tie_word_embeddings`.

    Args:
        **options: Fields of `LongNetConfig` (`num_tokens` is 256 if left out, for bytes), and
            those of every transformers config.

    Raises:
        TypeError, ValueError: As `LongNetConfig`.

    Example:
        >>> config = LongNetPretrainedConfig(
        ...     d_model=64, nhead=4, segment_lengths=[16, 32], dilation_rates=[1, 2],
        ...     num_key_value_heads=2,
        ... )
        >>> config.hidden_size, config.longnet.head_dim, config.longnet.num_kv_heads
        (64, 16, 2)
    """

    model_type = "longnet"
    attribute_map: ClassVar[dict[str, str]] = {
        "vocab_size": "num_tokens",
        "hidden_size": "d_model",
        "num_hidden_layers": "num_decoder_layers",
        "num_attention_heads": "nhead",
        "num_key_value_heads": "num_kv_heads",
        "intermediate_size": "dim_feedforward",
    }

    def __init__(self, **options: Any) -> None:
        for theirs, ours in {**self.attribute_map, "tie_word_embeddings": "tie_embeddings"}.items():
            if theirs in options:
                value = options.pop(theirs)
                if options.setdefault(ours, value) != value:
                    raise ValueError(
                        f"{theirs} is {value!r} and {ours} {options[ours]!r}; they are two names "
                        f"of one option, so give one of them."
                    )
        fields: dict[str, Any] = {n: options.pop(n) for n in _FIELDS if n in options}
        longnet = LongNetConfig.from_dict({"num_tokens": 256, **fields})
        options["tie_word_embeddings"] = longnet.tie_embeddings
        super().__init__(**options)
        for name, value in longnet.to_dict().items():
            setattr(self, name, value)

    @property
    def longnet(self) -> LongNetConfig:
        """The same as a `LongNetConfig`."""
        fields = {name: getattr(self, name) for name in _FIELDS}
        return LongNetConfig.from_dict(fields)
