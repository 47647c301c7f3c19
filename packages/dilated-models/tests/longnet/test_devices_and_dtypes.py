"""LongNetLM on meta tensors, under fake and default devices, and in float64 under autocast."""

import dataclasses

import pytest
import torch
from dilated_models import LongNetConfig, LongNetLM, evaluate, generate, load_model
from dilated_models.longnet.saving import save_model, write_config
from dilated_models.text.files import text_files
from dilated_models.text.streams import ByteStream
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode


@pytest.fixture(params=["xpos", "rotary", "none"])
def any_config(request, config: LongNetConfig) -> LongNetConfig:
    return dataclasses.replace(config, positions=request.param)


def positions_of(config: LongNetConfig, seq_len: int, **where: str) -> list[torch.Tensor | None]:
    return [None] if config.positions == "none" else [None, torch.arange(seq_len, **where)]


def test_on_meta_tensors(any_config, tokens):
    model = LongNetLM(any_config, device="meta")
    for positions in positions_of(any_config, 45, device="meta"):
        logits = model(tokens.to("meta"), positions=positions)
        assert (logits.device.type, logits.shape) == ("meta", (2, 45, 61))
        assert logits.dtype == torch.float32
        logits.sum().backward()
        assert model.embedding.weight.grad.device.type == "meta"


def test_a_model_without_weights_is_refused_where_values_are_needed(config, text, tmp_path):
    model = LongNetLM(config, device="meta")
    stream = ByteStream(text_files([text])[0])
    for call in (
        lambda: generate(model, [1], max_new_tokens=1),
        lambda: evaluate(model, stream, seq_len=8),
        lambda: save_model(tmp_path, model),
    ):
        with pytest.raises(ValueError, match="model is on the meta device; it must have weights"):
            call()


def test_under_fake_tensors(any_config):
    with FakeTensorMode():
        model = LongNetLM(any_config)
        tokens = torch.zeros(2, 45, dtype=torch.int64)
        for positions in positions_of(any_config, 45):
            logits = model(tokens, positions=positions)
            assert isinstance(logits, FakeTensor)
            assert (logits.device.type, logits.shape) == ("cpu", (2, 45, 61))
            logits.sum().backward()


@pytest.mark.parametrize("tied", [False, True])
def test_from_meta_to_weights(config, tokens, tied):
    config = dataclasses.replace(config, tie_embeddings=tied)
    expected = LongNetLM(config)
    with torch.device("meta"):
        assigned, copied = LongNetLM(config), LongNetLM(config)
    assigned.load_state_dict(expected.state_dict(), assign=True)
    copied.to_empty(device="cpu").load_state_dict(expected.state_dict())
    assert torch.equal(assigned(tokens), expected(tokens))
    assert torch.equal(copied(tokens), expected(tokens))


def test_from_meta_to_weights_drawn_anew(config):
    """`reset_parameters` fills every parameter, from the distributions of a new model."""
    config = dataclasses.replace(config, d_model=128, dim_feedforward=256, num_tokens=500)
    model = LongNetLM(config, device="meta").to_empty(device="cpu")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(float("nan"))
    model.reset_parameters()
    for (name, drawn), fresh in zip(
        model.named_parameters(), LongNetLM(config).parameters(), strict=True
    ):
        for moment in (torch.mean, torch.std):
            assert moment(drawn).item() == pytest.approx(moment(fresh).item(), abs=0.01), name


def test_a_default_device_changes_no_result(config, tokens, text, tmp_path):
    """Every tensor made inside lies where the model and its inputs do."""
    model = LongNetLM(dataclasses.replace(config, num_tokens=256)).eval()
    stream = ByteStream(text_files([text])[0])
    write_config(tmp_path, {"model": model.config.to_dict(), "tokenizer": "bytes"})
    positions = torch.arange(45)

    def results() -> list[object]:
        save_model(tmp_path, model)
        loaded = load_model(tmp_path)
        return [
            loaded(tokens).tolist(),
            loaded(tokens, positions=positions).tolist(),
            list(generate(loaded, b"def ", max_new_tokens=3)),
            evaluate(loaded, stream, seq_len=20, max_tokens=60),
        ]

    expected = results()
    with torch.device("meta"):
        assert results() == expected


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_float64_stays_float64_under_autocast(any_config, tokens, dtype):
    """As PyTorch's layers do. xPos may reach as far as float64 does."""
    any_config = dataclasses.replace(any_config, xpos_scale_base=1.0)
    model = LongNetLM(any_config, dtype=torch.float64)
    expected = model(tokens)
    upstream = torch.randn_like(expected)
    gradients = torch.autograd.grad(expected, list(model.parameters()), upstream)
    with torch.autocast("cpu", dtype):
        logits = model(tokens)
    assert logits.dtype == torch.float64
    assert torch.equal(logits, expected)
    actual = torch.autograd.grad(logits, list(model.parameters()), upstream)
    assert all(torch.equal(a, b) for a, b in zip(actual, gradients, strict=True))
