"""Packed documents: each gets the logits and gradients that it gets alone."""

import dataclasses

import pytest
import torch
from dilated_models import LongNetConfig, LongNetLM
from torch._subclasses.fake_tensor import FakeTensorMode

LENGTHS = (45, 0, 1, 1, 17, 0, 100, 2, 0)


def bounds_of(lengths: tuple[int, ...]) -> torch.Tensor:
    return torch.tensor([0, *lengths]).cumsum(0)


def made(config: LongNetConfig, dtype: torch.dtype = torch.float32, **changes: object) -> LongNetLM:
    torch.manual_seed(0)
    model = LongNetLM(dataclasses.replace(config, **changes), dtype=dtype)
    with torch.no_grad():
        for block in model.blocks:
            if block.key_conv is not None:
                block.key_conv.weight.normal_()
    return model


@pytest.mark.parametrize("is_causal", [True, False])
@pytest.mark.parametrize("key_conv", [0, 4])
@pytest.mark.parametrize("positions", ["xpos", "rotary", "none"])
def test_packed_equals_alone(config, positions, key_conv, is_causal):
    model = made(config, positions=positions, key_conv=key_conv)
    tokens = torch.randint(61, (sum(LENGTHS),), generator=torch.Generator().manual_seed(3))
    packed = model(tokens, is_causal, cu_seqlens=bounds_of(LENGTHS).int())
    assert packed.shape == (sum(LENGTHS), 61)
    alone = torch.cat(
        [model(part[None], is_causal)[0] for part in tokens.split(LENGTHS) if len(part)]
    )
    torch.testing.assert_close(packed, alone, rtol=0, atol=1e-5)
    upstream = torch.randn_like(packed)
    parameters = dict(model.named_parameters())
    gradients = [torch.autograd.grad(out, parameters.values(), upstream) for out in (packed, alone)]
    for name, mine, theirs in zip(parameters, *gradients, strict=True):
        scale = theirs.abs().max().clamp(min=1).item()
        torch.testing.assert_close(
            mine, theirs, rtol=0, atol=1e-5 * scale, msg=lambda text, n=name: f"{n}: {text}"
        )


def test_documents_do_not_see_each_other(config):
    """In float64, exactly: a change in one document changes no logit of another."""
    model = made(config, torch.float64, key_conv=3)
    cu_seqlens = torch.tensor([0, 20, 50, 60])
    tokens = torch.randint(61, (60,), generator=torch.Generator().manual_seed(3))
    other = tokens.clone()
    other[20:50] = (other[20:50] + 1) % 61
    with torch.no_grad():
        difference = (
            model(tokens, cu_seqlens=cu_seqlens) - model(other, cu_seqlens=cu_seqlens)
        ).abs()
    assert difference[:20].max() == difference[50:].max() == 0
    assert difference[20:50].amax(-1).min() > 0


def test_packed_with_recomputation_and_explicit_positions(config):
    tokens = torch.randint(61, (60,), generator=torch.Generator().manual_seed(3))
    cu_seqlens = torch.tensor([0, 20, 50, 60])
    counted = torch.cat([torch.arange(n) for n in (20, 30, 10)])
    plain, recomputed = (
        made(config, torch.float64, key_conv=3, activation_checkpointing=on) for on in (False, True)
    )
    expected = plain(tokens, cu_seqlens=cu_seqlens)
    actual = recomputed(tokens, cu_seqlens=cu_seqlens, positions=counted + 5)
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-10)
    expected.square().mean().backward()
    actual.square().mean().backward()
    for mine, theirs in zip(recomputed.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad, rtol=0, atol=1e-10)


def test_packed_on_meta_and_fake_tensors(config):
    model = LongNetLM(dataclasses.replace(config, key_conv=2), device="meta")
    tokens = torch.zeros(30, dtype=torch.int64)
    logits = model(tokens.to("meta"), cu_seqlens=torch.tensor([0, 10, 30], device="meta"))
    assert (logits.device.type, logits.shape) == ("meta", (30, 61))
    with FakeTensorMode():
        fake = LongNetLM(dataclasses.replace(config, key_conv=2))
        tokens, bounds = torch.zeros(30, dtype=torch.int64), torch.zeros(3, dtype=torch.int64)
        assert fake(tokens, cu_seqlens=bounds).shape == (30, 61)


def test_long_documents_in_the_range_of_xpos_pack_to_any_length(config):
    """xPos is limited by the longest document, not by the length of the pack."""
    model = made(config, xpos_scale_base=1.0, positions="xpos")
    tokens = torch.zeros(1000, dtype=torch.int64)
    with pytest.raises(ValueError, match="stays within the range"):
        model(tokens, cu_seqlens=torch.tensor([0, 1000]))
    packed = model(tokens, cu_seqlens=torch.arange(0, 1001, 50))
    torch.testing.assert_close(packed[950:], model(tokens[None, :50])[0], rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("tokens", "cu_seqlens", "error", "message"),
    [
        (torch.zeros(1, 4).long(), torch.tensor([0, 4]), ValueError, r"it must be \(T,\), as cu_"),
        (torch.zeros(4).long(), [0, 4], TypeError, "cu_seqlens is a list; it must be an int32 or"),
        (torch.zeros(4).long(), torch.tensor([0.0, 4.0]), TypeError, "cu_seqlens has dtype"),
        (
            torch.zeros(4).long(),
            torch.zeros(2).long().to("meta"),
            ValueError,
            "on meta and holds no",
        ),
        (torch.zeros(4).long(), torch.tensor([4]), ValueError, r"cu_seqlens has shape \(1,\)"),
        (torch.zeros(4).long(), torch.tensor([0, 3]), ValueError, "cu_seqlens ends at 3 and q has"),
        (torch.zeros(4).long(), torch.tensor([0, 9]), ValueError, "cu_seqlens ends at 9 and q has"),
        (torch.zeros(4).long(), torch.tensor([1, 4]), ValueError, "cu_seqlens starts at 1"),
        (torch.zeros(4).long(), torch.tensor([0, 3, 2, 4]), ValueError, "goes from 3 to 2"),
    ],
)
def test_refusals(model, tokens, cu_seqlens, error, message):
    with pytest.raises(error, match=message):
        model(tokens, cu_seqlens=cu_seqlens)
