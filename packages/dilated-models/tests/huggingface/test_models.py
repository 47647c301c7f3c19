"""LongNetForCausalLM and LongNetModel are LongNetLM, in files, training and generation."""

from pathlib import Path
from typing import Any

import pytest
import torch
from dilated_models import LongNetLM
from dilated_models.huggingface import (
    LongNetForCausalLM,
    LongNetModel,
    LongNetPretrainedConfig,
)
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    DynamicCache,
)
from transformers.loss.loss_utils import ForCausalLMLoss


def make(**options: Any) -> LongNetForCausalLM:
    torch.manual_seed(0)
    config = LongNetPretrainedConfig(
        num_tokens=61,
        d_model=32,
        nhead=4,
        num_decoder_layers=2,
        dim_feedforward=48,
        segment_lengths=[6, 16, 40],
        dilation_rates=[1, 3, 4],
        **options,
    )
    return LongNetForCausalLM(config).double().eval()


def test_a_model_is_the_language_model(tokens: torch.Tensor) -> None:
    model = make()
    torch.manual_seed(0)
    alone = LongNetLM(model.config.longnet).double()
    assert all(
        torch.equal(a, b) for a, b in zip(model.parameters(), alone.parameters(), strict=True)
    )
    output = model(tokens, labels=tokens)
    assert torch.equal(output.logits, alone(tokens))
    wanted = torch.nn.functional.cross_entropy(
        alone(tokens)[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()
    )
    torch.testing.assert_close(output.loss, wanted)


@pytest.mark.parametrize("count", [None, 100, torch.tensor(100)])
def test_the_loss_is_that_of_transformers_without_logits(
    tokens: torch.Tensor, count: object
) -> None:
    """In training; a loss function that the user has set is given the logits."""
    labels = tokens.masked_fill(tokens % 5 == 0, -100)
    found, given = [], []
    for is_own in (False, True):
        model = make().train()
        if is_own:

            def own(logits: torch.Tensor, labels: torch.Tensor, **options: Any) -> torch.Tensor:
                given.append(logits)
                return ForCausalLMLoss(logits, labels, **options)

            model.loss_function = own
        output = model(tokens, labels=labels, num_items_in_batch=count)
        output.loss.backward()
        assert (output.logits is None) == (not is_own)
        found.append([output.loss, *(p.grad for p in model.parameters())])
    assert len(given) == 1
    for ours, theirs in zip(*found, strict=True):  # transformers' loss is float32
        torch.testing.assert_close(ours.double(), theirs.double(), rtol=1e-5, atol=1e-7)
    assert make().train()(tokens, labels=labels, logits_to_keep=2).logits.shape[1] == 2
    assert make()(tokens, labels=labels).logits.shape[1] == tokens.shape[1]


@pytest.mark.parametrize("tied", [False, True])
def test_a_saved_model_is_loaded_by_auto_classes(
    tokens: torch.Tensor, tmp_path: Path, tied: bool
) -> None:
    model = make(tie_embeddings=tied)
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert isinstance(again, LongNetForCausalLM)
    assert again.config.longnet == model.config.longnet
    assert torch.equal(again.double()(tokens).logits, model(tokens).logits)
    assert (again.lm.output.weight is again.lm.embedding.weight) == tied
    base = AutoModel.from_pretrained(tmp_path).double()
    assert isinstance(base, LongNetModel)
    assert torch.equal(base(tokens).last_hidden_state, model.lm.hidden_states(tokens))


def test_loading_is_strict(tmp_path: Path) -> None:
    model = make()
    model.save_pretrained(tmp_path)
    wider = LongNetPretrainedConfig(**{**model.config.longnet.to_dict(), "num_decoder_layers": 3})
    with pytest.raises(ValueError, match="missing_keys"):
        LongNetForCausalLM.from_pretrained(tmp_path, config=wider)


def test_names_of_transformers_are_the_same_options() -> None:
    config = LongNetPretrainedConfig(hidden_size=64, nhead=4, vocab_size=9)
    assert (config.d_model, config.num_tokens, config.num_attention_heads) == (64, 9, 4)
    with pytest.raises(ValueError, match="two names of one option"):
        LongNetPretrainedConfig(hidden_size=64, d_model=32)
    with pytest.raises(ValueError, match="nhead is 5"):
        LongNetPretrainedConfig(d_model=64, nhead=5)


def test_documents_and_padding_are_as_if_alone(tokens: torch.Tensor) -> None:
    model = make()
    positions = torch.cat([torch.arange(20), torch.arange(25)])[None]
    packed = model(tokens, position_ids=positions).logits
    alone = [model(part).logits for part in tokens.split([20, 25], 1)]
    torch.testing.assert_close(packed, torch.cat(alone, 1), rtol=1e-9, atol=1e-10)
    mask = torch.ones_like(tokens)
    mask[1, :16] = 0
    padded = model(tokens, attention_mask=mask).logits
    torch.testing.assert_close(padded[1, 16:], model(tokens[1:, 16:]).logits[0])
    with pytest.raises(ValueError, match="has 9 after 4"):
        model(tokens[:, :6], position_ids=torch.tensor([[0, 1, 2, 3, 4, 9]]))


@pytest.mark.parametrize(
    ("options", "count"),
    [({}, 20), ({"num_encoder_layers": 1, "num_kv_heads": 2, "positions": "alibi"}, 6)],
)
def test_generate_equals_whole_forwards_in_a_left_padded_batch(
    tokens: torch.Tensor, options: dict[str, Any], count: int
) -> None:
    model = make(**options)
    mask = torch.ones_like(tokens)
    mask[1, :16] = 0
    arguments: dict[str, Any] = {"max_new_tokens": count, "do_sample": False}
    out = model.generate(tokens, attention_mask=mask, **arguments)
    for b, start in enumerate([0, 16]):
        text = tokens[b : b + 1, start:]
        for _ in range(count):
            text = torch.cat([text, model(text).logits[:, -1:].argmax(-1)], 1)
        assert out[b, start:].tolist() == text[0].tolist()
    beams = {**arguments, "num_beams": 3}
    with_cache = model.generate(tokens, attention_mask=torch.ones_like(tokens), **beams)
    without = model.generate(
        tokens, attention_mask=torch.ones_like(tokens), use_cache=False, **beams
    )
    assert torch.equal(with_cache, without)


def test_the_cache_does_not_grow(tokens: torch.Tensor) -> None:
    model = make()
    first = model(tokens, use_cache=True, logits_to_keep=1)
    cache = first.past_key_values
    size = cache.state.nbytes
    torch.testing.assert_close(first.logits, model(tokens).logits[:, -1:])
    for _ in range(3):
        model(tokens, past_key_values=cache, logits_to_keep=1)
    assert (cache.get_seq_length(), cache.state.nbytes) == (180, size)
    with pytest.raises(ValueError, match="keeps no token"):
        cache.crop(-1)


def test_caches_of_other_models_are_refused(llama: Any, tokens: torch.Tensor, cached: Any) -> None:
    model = make()
    cache = model(tokens, use_cache=True, logits_to_keep=1).past_key_values
    with pytest.raises(ValueError, match=r"takes a DilatedCache\(model\.config\)"):
        cached(llama, tokens[:, :1], cache)
    for other in (DynamicCache(), "static"):
        with pytest.raises(TypeError, match="it must be what a call with use_cache=True returned"):
            model(tokens, past_key_values=other, logits_to_keep=1)
    with pytest.raises(ValueError, match="which continuous batching cannot page"):
        model.generate_batch([[1, 2, 3]], max_new_tokens=2)


def test_what_cannot_be_honoured_is_refused(tokens: torch.Tensor) -> None:
    model = make()
    for arguments, match in [
        ({"use_cache": True}, "logits_to_keep=1"),
        ({"use_cache": True, "labels": tokens, "logits_to_keep": 1}, "no labels"),
        ({"output_attentions": True}, "attention_rows"),
        (
            {
                "use_cache": True,
                "logits_to_keep": 1,
                "position_ids": torch.cat([torch.arange(20), torch.arange(25)])[None],
            },
            "one text for each row",
        ),
        ({"inputs_embeds": torch.zeros(1)}, "unknown here"),
        ({"attention_mask": torch.ones(2, 3)}, "must be"),
    ]:
        with pytest.raises(ValueError, match=match):
            model(tokens, **arguments)
