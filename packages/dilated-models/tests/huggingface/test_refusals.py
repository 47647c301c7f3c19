"""Whatever cannot be honoured raises, and the message says what to do."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from dilated_models.huggingface.attention import dilated_attention_forward
from dilated_models.huggingface.masks import dilated_mask
from transformers import masking_utils

Build = Callable[..., Any]


def attend(module: Any, **arguments: Any) -> Any:
    q = torch.randn(2, 4, 6, 8)
    given = {"position_ids": torch.arange(6)[None], **arguments}
    k = given.pop("key", q)
    return dilated_attention_forward(module, q, k, k, given.pop("attention_mask", None), **given)


@pytest.mark.parametrize(
    ("name", "value", "match"),
    [
        ("sliding_window", 4, "config.sliding_window = None"),
        ("softcap", 30.0, "no backend caps scores"),
        ("s_aux", torch.zeros(4), r"s_aux=\(4,\).*sinks"),
        ("position_bias", torch.zeros(1, 4, 6, 6), "no backend adds a bias"),
        ("output_attentions", True, "attention_rows"),
        ("indices", torch.zeros(1), "unknown here"),
    ],
)
def test_arguments_that_cannot_be_honoured(
    llama: Any, name: str, value: object, match: str
) -> None:
    layer = llama.model.layers[0].self_attn
    attend(layer, **{name: None})
    with pytest.raises(ValueError, match=match):
        attend(layer, **{name: value})


def test_output_attentions_of_a_model(llama: Any, tokens: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="attention_rows"):
        llama(tokens, output_attentions=True)


def test_masks_that_callers_prepare(llama: Any, tokens: torch.Tensor) -> None:
    mask = torch.ones(2, 1, 45, 45, dtype=torch.bool).tril()
    with pytest.raises(ValueError, match=r"shape \(2, 1, 45, 45\); it must be 2-D"):
        llama(tokens, attention_mask=mask)


def test_shapes_that_do_not_fit(llama: Any, build_model: Build) -> None:
    layer = llama.model.layers[0].self_attn
    with pytest.raises(ValueError, match=r"position_ids is a Tensor of shape \(3, 2, 6\)"):
        attend(layer, position_ids=torch.zeros(3, 2, 6, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"attention_mask has shape \(3, 6\)"):
        attend(layer, attention_mask=torch.ones(3, 6, dtype=torch.bool))
    encoder = build_model("bert").bert.encoder.layer[0].attention.self
    with pytest.raises(ValueError, match="6 queries and 9 keys and is not causal"):
        attend(encoder, key=torch.randn(2, 4, 9, 8), position_ids=None)


def test_heads_spread_over_devices(llama: Any) -> None:
    q = torch.randn(1, 2, 6, 8)
    with pytest.raises(ValueError, match="2 of 4 heads, as under tensor parallelism"):
        dilated_attention_forward(llama.model.layers[0].self_attn, q, q, q, None)


def test_cross_attention(tokens: torch.Tensor) -> None:
    config = transformers.BartConfig(
        vocab_size=61,
        d_model=16,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=16,
        decoder_ffn_dim=16,
    )
    config.segment_lengths, config.dilation_rates = [8], [1]
    bart = transformers.BartModel._from_config(config, attn_implementation="dilated")
    with pytest.raises(ValueError, match="cross-attention"):
        bart(tokens)


def test_sliding_windows_of_a_model(tokens: torch.Tensor) -> None:
    config = transformers.MistralConfig(
        vocab_size=61,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        sliding_window=8,
    )
    config.segment_lengths, config.dilation_rates = [8], [1]
    model = transformers.MistralForCausalLM._from_config(config, attn_implementation="dilated")
    with pytest.raises(ValueError, match="cannot honour: a sliding window"):
        model(tokens)
    model.config.sliding_window = None
    for layer in model.model.layers:
        assert layer.self_attn.config is model.config
    assert model(tokens).logits.isfinite().all()


def test_sliding_windows_in_some_layers(tokens: torch.Tensor) -> None:
    sizes = {"vocab_size": 61, "hidden_size": 32, "intermediate_size": 48}
    heads = {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    window = {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}
    config = transformers.Qwen2Config(**sizes, **heads, **window)
    assert config.layer_types == ["full_attention", "sliding_attention"]
    config.segment_lengths, config.dilation_rates = [8], [1]
    model = transformers.Qwen2ForCausalLM._from_config(config, attn_implementation="dilated")
    with pytest.raises(ValueError, match="cannot honour: a sliding window"):
        model(tokens)


def test_masks_of_a_caller_and_dropped_tokens() -> None:
    sizes = {"batch_size": 1, "q_length": 3, "kv_length": 3}
    causal = masking_utils.causal_mask_function
    assert dilated_mask(**sizes, mask_function=causal) is None
    for other in (
        masking_utils.and_masks(causal, masking_utils.sliding_window_overlay(2)),
        masking_utils.or_masks(causal, causal),
        lambda b, h, q, k: q >= k,
    ):
        with pytest.raises(ValueError, match="which it cannot honour"):
            dilated_mask(**sizes, mask_function=other)
    with pytest.raises(ValueError, match="has dropped the first 2 tokens"):
        dilated_mask(**sizes, mask_function=causal, kv_offset=2)


def test_continuous_batching_is_refused_by_transformers(llama: Any, tokens: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="dilated is not supported for continuous batching"):
        llama.generate_batch([tokens[0].tolist()], max_new_tokens=2)
