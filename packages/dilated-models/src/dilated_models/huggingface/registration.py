"""Make `attn_implementation="dilated"` known to transformers."""

from __future__ import annotations

from dilated_models.huggingface.attention import dilated_attention_forward
from dilated_models.huggingface.masks import dilated_mask

NAME = "dilated"


def register_with_transformers() -> None:
    """Make `attn_implementation="dilated"` known to transformers, with its mask function.

    Models then take the pattern from `segment_lengths` and `dilation_rates` of their config, or
    from `dilated_pattern`. Calling it again changes nothing.

    Raises:
        ModuleNotFoundError: If transformers is not installed.

    Example:
        >>> import torch
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> register_with_transformers()
        >>> config = LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=64,
        ...                      num_hidden_layers=2, num_attention_heads=4)
        >>> config.segment_lengths, config.dilation_rates = [8, 32], [1, 4]
        >>> model = LlamaForCausalLM._from_config(config, attn_implementation="dilated")
        >>> model(torch.zeros(1, 50, dtype=torch.int64)).logits.shape
        torch.Size([1, 50, 64])
    """
    try:
        from transformers import AttentionInterface, AttentionMaskInterface
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "transformers is not installed; pip install 'dilated-models[huggingface]'."
        ) from error
    AttentionInterface.register(NAME, dilated_attention_forward)
    AttentionMaskInterface.register(NAME, dilated_mask)
