"""Models with `attn_implementation="dilated"` against sdpa and against the definition."""

import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from dilated_core import DilatedPattern
from dilated_models.huggingface import dilated_pattern, register_with_transformers

KINDS = ["llama", "qwen3", "gpt2", "bert"]
DENSE = DilatedPattern([1000], [1])
PATTERN = DilatedPattern([5, 12, 40], [1, 2, 3])
BLOCKED = DilatedPattern([5, 12, 40], [1, 2, 3], head_offsets="blocked")
Build = Callable[..., Any]


def gradients(model: Any, tokens: torch.Tensor) -> list[torch.Tensor]:
    logits = model(tokens).logits
    upstream = torch.randn(logits.shape, dtype=logits.dtype, generator=torch.manual_seed(2))
    model.zero_grad()
    logits.backward(upstream)
    found = [p.grad for p in model.parameters() if p.grad is not None]
    return [logits.detach(), *(g.clone() for g in found)]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("attention", "pattern"), [("oracle", PATTERN), ("oracle", BLOCKED), ("sdpa", DENSE)]
)
def test_logits_and_gradients_are_those_of_the_definition_and_of_sdpa(
    build_model: Build, tokens: torch.Tensor, kind: str, attention: str, pattern: Any
) -> None:
    actual = gradients(build_model(kind, pattern), tokens)
    wanted = gradients(build_model(kind, pattern, attention), tokens)
    assert len(actual) == len(wanted) > 10
    for a, b in zip(actual, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)


def test_a_dilated_pattern_is_not_dense_attention(build_model: Build, tokens: torch.Tensor) -> None:
    a, b = build_model("llama")(tokens).logits, build_model("llama", DENSE)(tokens).logits
    assert (a - b).abs().max() > 1e-3


def test_the_pattern_of_a_with_goes_before_that_of_the_config(
    build_model: Build, tokens: torch.Tensor
) -> None:
    model = build_model("llama")
    before = model(tokens).logits
    with dilated_pattern([1000], [1], backend="eager"):
        inside = model(tokens).logits
    torch.testing.assert_close(inside, build_model("llama", DENSE)(tokens).logits)
    assert torch.equal(model(tokens).logits, before)
    model.config.segment_lengths = None
    with pytest.raises(ValueError, match=r"LlamaConfig has no segment_lengths.*with dilated_pat"):
        model(tokens)
    with pytest.raises(ValueError, match="segment"), dilated_pattern([0], [1]):
        pass


def test_a_model_is_saved_and_loaded_with_its_pattern(
    llama: Any, tokens: torch.Tensor, tmp_path: Any
) -> None:
    llama.save_pretrained(tmp_path)
    again = type(llama).from_pretrained(tmp_path, attn_implementation="dilated").eval()
    saved = [getattr(again.config, n) for n in ("segment_lengths", "dilation_rates")]
    assert saved == [[5, 12, 40], [1, 2, 3]]
    assert again.config.head_offsets == "interleaved"
    torch.testing.assert_close(again.double()(tokens).logits, llama(tokens).logits)


def test_registering_twice_and_switching_an_existing_model(
    build_model: Build, tokens: torch.Tensor
) -> None:
    register_with_transformers()
    model = build_model("llama", attention="sdpa")
    model.set_attn_implementation("dilated")
    assert torch.equal(model(tokens).logits, build_model("llama")(tokens).logits)


def test_dropout_acts_in_training_only(build_model: Build, tokens: torch.Tensor) -> None:
    model = build_model("llama")
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.5
    calm = model(tokens).logits
    torch.manual_seed(3)
    first = model.train()(tokens).logits
    torch.manual_seed(3)
    assert torch.equal(model(tokens).logits, first)
    assert (first - calm).abs().max() > 1e-3
    torch.testing.assert_close(model.eval()(tokens).logits, calm)


def test_gradient_checkpointing_gives_the_same_gradients(
    build_model: Build, tokens: torch.Tensor
) -> None:
    plain = gradients(build_model("llama").train(), tokens)
    model = build_model("llama").train()
    enable = getattr(model, "activation_checkpointing_enable", None)  # its name from 5.24 on
    (enable or model.gradient_checkpointing_enable)()
    for a, b in zip(gradients(model, tokens), plain, strict=True):
        torch.testing.assert_close(a, b)


def test_is_causal_is_honoured_or_refused(build_model: Build, tokens: torch.Tensor) -> None:
    def both(kind: str, attention: str) -> torch.Tensor:
        return build_model(kind, DENSE, attention=attention)(tokens, is_causal=False).logits

    torch.testing.assert_close(both("llama", "dilated"), both("llama", "sdpa"))
    with pytest.raises(ValueError, match="is_causal is True and BertSelfAttention"):
        build_model("bert")(tokens, is_causal=True)


def test_bfloat16_under_autocast(build_model: Build, tokens: torch.Tensor) -> None:
    model = build_model("llama").float()
    wanted = model(tokens).logits
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = model(tokens).logits
    assert (actual.float() - wanted).abs().max() < 0.05 * wanted.abs().max()


@torch.no_grad()
def test_a_model_in_bfloat16_is_as_near_as_the_definition_in_it(
    build_model: Build, tokens: torch.Tensor
) -> None:
    exact = build_model("llama")(tokens).logits
    wanted = build_model("llama", attention="oracle").bfloat16()(tokens).logits
    actual = build_model("llama").bfloat16()(tokens).logits
    assert actual.dtype == torch.bfloat16
    assert (actual - exact).abs().max() <= 2 * (wanted - exact).abs().max()


@pytest.mark.exhaustive  # half a minute of compilation
# From torch._dynamo itself, which reads a tensor between two graphs.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@torch.no_grad()
def test_a_compiled_model_leaves_attention_out_of_its_graph(
    llama: Any, tokens: torch.Tensor
) -> None:
    compiled = torch.compile(llama, backend="eager")
    assert torch.equal(compiled(tokens).logits, llama(tokens).logits)
    torch._dynamo.reset()
    with pytest.raises(torch._dynamo.exc.Unsupported):
        torch.compile(llama, backend="eager", fullgraph=True)(tokens)


def test_without_transformers_the_error_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ModuleNotFoundError, match=r"dilated-models\[huggingface\]"):
        register_with_transformers()
