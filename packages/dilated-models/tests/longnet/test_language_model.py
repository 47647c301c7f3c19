"""LongNetLM against the definition, and the properties a language model must have."""

import copy
import dataclasses
import math
import pickle

import pytest
import torch
from dilated_core import DilatedPattern, reference_dilated_attention
from dilated_models import LongNetConfig, LongNetLM
from dilated_models.layers.self_attention import DilatedSelfAttention
from torch import nn


def with_reference_attention(model: LongNetLM) -> LongNetLM:
    """The same model, its attention evaluated from the definition."""
    model = copy.deepcopy(model)
    config = model.config

    def attend(q, k, v, *, is_causal=False, cu_seqlens=None):
        pattern = DilatedPattern(
            config.segment_lengths,
            config.dilation_rates,
            head_offsets=config.head_offsets,
            padding=config.padding,
        )
        return reference_dilated_attention(
            q, k, v, pattern, is_causal=is_causal, cu_seqlens=cu_seqlens
        )

    replaced = 0
    for module in model.modules():
        if isinstance(module, DilatedSelfAttention):
            module.attend = attend
            replaced += 1
    assert replaced == config.num_decoder_layers
    return model


@pytest.mark.parametrize("is_causal", [True, False])
@pytest.mark.parametrize("backend", ["auto", "eager"])
@pytest.mark.parametrize(
    "change",
    [
        {},
        {"head_offsets": "blocked", "padding": "attended"},
        {"positions": "rotary", "activation": "gelu", "tie_embeddings": True, "num_kv_heads": 2},
        {"positions": "none", "scale_embedding": False, "final_layer_norm": False},
    ],
)
def test_equals_the_definition_forward_and_backward(config, tokens, change, backend, is_causal):
    torch.manual_seed(0)
    config = dataclasses.replace(config, backend=backend, **change)
    model = LongNetLM(config, dtype=torch.float64)
    oracle = with_reference_attention(model)
    actual, expected = model(tokens, is_causal), oracle(tokens, is_causal)
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-10)
    upstream = torch.randn_like(actual)
    actual.backward(upstream)
    expected.backward(upstream)
    for (name, mine), theirs in zip(model.named_parameters(), oracle.parameters(), strict=True):
        torch.testing.assert_close(
            mine.grad, theirs.grad, rtol=0, atol=1e-9, msg=lambda text, n=name: f"{n}: {text}"
        )


def test_the_future_does_not_leak(model, tokens):
    with torch.no_grad():
        logits = model(tokens)
        for changed in (1, 7, 16, 30, 44):
            other = tokens.clone()
            other[:, changed:] = (other[:, changed:] + 1) % 61
            perturbed = model(other)
            torch.testing.assert_close(
                perturbed[:, :changed], logits[:, :changed], rtol=0, atol=1e-12
            )
            assert (perturbed[:, changed] - logits[:, changed]).abs().max() > 1e-3
        # Not causal, the first position does see the change.
        assert (model(other, is_causal=False)[:, 0] - model(tokens, False)[:, 0]).abs().max() > 1e-6


def test_a_prefix_scores_as_in_the_whole(model, tokens):
    with torch.no_grad():
        whole = model(tokens)
        for length in (1, 5, 17, 41):
            prefix = model(tokens[:, :length])
            torch.testing.assert_close(prefix, whole[:, :length], rtol=0, atol=1e-10)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_activation_checkpointing_changes_nothing(config, tokens, dropout):
    gradients = []
    calls = []
    for recompute in (False, True):
        torch.manual_seed(0)
        changed = dataclasses.replace(config, activation_checkpointing=recompute, dropout=dropout)
        model = LongNetLM(changed, dtype=torch.float64)
        count = [0]
        model.blocks[0].register_forward_pre_hook(lambda *_, c=count: c.__setitem__(0, c[0] + 1))
        torch.manual_seed(1)
        model(tokens).square().mean().backward()
        gradients.append([p.grad for p in model.parameters()])
        calls.append(count[0])
    assert calls == [1, 2]  # the second model did run its blocks again
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


def test_dropout_acts_in_training_only(config, tokens):
    model = LongNetLM(dataclasses.replace(config, dropout=0.5))
    assert not torch.equal(model(tokens), model(tokens))
    model.eval()
    assert torch.equal(model(tokens), model(tokens))


def test_paths_are_dropped_in_training_only(config, tokens):
    """The rate grows with depth: with nearly 1 in the last of two blocks, it adds nothing."""
    torch.manual_seed(0)
    model = LongNetLM(dataclasses.replace(config, drop_path_rate=0.999999))
    assert [block.drop_path for block in model.blocks] == [0.0, 0.999999]
    one = LongNetLM(dataclasses.replace(config, num_decoder_layers=1))
    one.load_state_dict(model.state_dict(), strict=False)
    assert torch.equal(model(tokens), one(tokens))
    cu_seqlens = torch.tensor([0, 20, 45])
    packed = [net(tokens[0], cu_seqlens=cu_seqlens) for net in (model, one)]
    assert torch.equal(*packed)
    model.eval()
    assert not torch.equal(model(tokens), one(tokens))


def test_explicit_positions(model, tokens):
    with torch.no_grad():
        counted = model(tokens)
        named = model(tokens, positions=torch.arange(45))
        shifted = model(tokens, positions=torch.arange(45) + 1000)
        stretched = model(tokens, positions=torch.arange(45) * 2)
    torch.testing.assert_close(named, counted, rtol=0, atol=1e-10)
    torch.testing.assert_close(shifted, counted, rtol=0, atol=1e-9)
    assert (stretched - counted).abs().max() > 1e-3


def test_initialisation():
    torch.manual_seed(0)
    model = LongNetLM(
        num_tokens=500,
        d_model=256,
        nhead=4,
        num_decoder_layers=3,
        dim_feedforward=1024,
        segment_lengths=[8],
        dilation_rates=[1],
    )
    gamma = math.sqrt(math.log(6))

    def xavier_bound(weight: torch.Tensor, gain: float) -> float:
        return gain * math.sqrt(6 / sum(weight.shape))

    for block in model.blocks:
        attention, feed_forward = block.attention, block.feed_forward
        for linear, gain in (
            (attention.q_proj, 2**-0.5),
            (attention.k_proj, 2**-0.5),
            (attention.v_proj, gamma * 2**-0.5),
            (attention.out_proj, gamma),
            (feed_forward.fc1, gamma),
            (feed_forward.fc2, gamma),
        ):
            bound = xavier_bound(linear.weight, gain)
            assert 0.99 * bound < linear.weight.abs().max() <= bound
            assert linear.weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.02)
            assert linear.bias.eq(0).all()
    assert model.embedding.weight.std().item() == pytest.approx(256**-0.5, rel=0.02)
    assert model.output.weight.std().item() == pytest.approx(256**-0.5, rel=0.02)
    assert sum(isinstance(m, torch.nn.LayerNorm) for m in model.modules()) == 3 * 4 + 1


def test_tied_embeddings(config, tokens):
    torch.manual_seed(0)
    untied = LongNetLM(config, dtype=torch.float64)
    tied = LongNetLM(dataclasses.replace(config, tie_embeddings=True), dtype=torch.float64)
    assert tied.output.weight is tied.embedding.weight
    assert untied.output.weight is not untied.embedding.weight
    assert len(list(untied.parameters())) - len(list(tied.parameters())) == 1
    untied.load_state_dict(tied.state_dict())
    logits = tied(tokens)
    assert torch.equal(logits, untied(tokens))
    upstream = torch.randn_like(logits)
    logits.backward(upstream)
    untied(tokens).backward(upstream)
    both = untied.embedding.weight.grad + untied.output.weight.grad
    torch.testing.assert_close(tied.embedding.weight.grad, both, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    "remake",
    [
        copy.deepcopy,
        lambda model: pickle.loads(pickle.dumps(model)),
        lambda model: model.to(torch.float64),
        lambda model: model.to("meta"),
        lambda model: model.to("meta").to_empty(device="cpu"),
        lambda model: nn.ModuleList([model.to("meta")]).to_empty(device="cpu")[0],
    ],
    ids=["deepcopy", "pickle", "to a dtype", "to meta", "to_empty", "to_empty of its owner"],
)
def test_tied_embeddings_stay_tied(config, remake):
    model = remake(LongNetLM(dataclasses.replace(config, tie_embeddings=True)))
    assert model.output.weight is model.embedding.weight


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("stored", ["embedding.weight", "output.weight", "both"])
def test_a_shared_weight_is_loaded_from_either_name(config, tokens, assign, stored):
    config = dataclasses.replace(config, tie_embeddings=True)
    expected, model = (LongNetLM(config, dtype=torch.float64) for _ in range(2))
    state = copy.deepcopy(expected.state_dict())
    if stored != "both":
        state[stored] = (state.pop("embedding.weight"), state.pop("output.weight"))[0]
    model.load_state_dict(state, assign=assign)
    assert model.output.weight is model.embedding.weight
    assert torch.equal(model(tokens), expected(tokens))


def test_two_weights_are_not_loaded_into_one(config):
    untied = LongNetLM(config).state_dict()
    tied = LongNetLM(dataclasses.replace(config, tie_embeddings=True))
    with pytest.raises(RuntimeError, match=r"embedding\.weight and output\.weight differ"):
        tied.load_state_dict(untied)


def test_copies_pickles_and_shows_itself(model, tokens):
    expected = model(tokens)
    assert torch.equal(copy.deepcopy(model)(tokens), expected)
    assert torch.equal(pickle.loads(pickle.dumps(model))(tokens), expected)
    assert "DilatedSelfAttention" in repr(model)


def test_float32_and_bfloat16_autocast_stay_close_to_float64(model, tokens):
    exact = model(tokens)
    single = copy.deepcopy(model).float()
    torch.testing.assert_close(single(tokens).double(), exact, rtol=0, atol=5e-5)
    with torch.autocast("cpu", torch.bfloat16):
        low = single(tokens)
    assert 1e-4 < (low.double() - exact).abs().max() < 0.15


def test_empty_and_single_sequences(model):
    assert model(torch.zeros(3, 1, dtype=torch.int64)).shape == (3, 1, 61)


def test_refusals(model, config):
    with pytest.raises(TypeError, match=r"tokens has dtype torch\.float32; it must be int64"):
        model(torch.zeros(1, 4))
    with pytest.raises(TypeError, match="tokens is a list; it must be a tensor"):
        model([1, 2])
    with pytest.raises(
        ValueError, match=r"tokens has shape \(4,\); it must be \(B, S\), or \(T,\)"
    ):
        model(torch.zeros(4, dtype=torch.int64))
    four = torch.zeros(1, 4, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"positions has shape \(3,\) and there are 4 tokens"):
        model(four, positions=torch.arange(3))
    with pytest.raises(TypeError, match=r"positions has dtype torch\.float32; it must be int64"):
        model(four, positions=torch.arange(4.0))
    with pytest.raises(ValueError, match="positions is on meta and tokens on cpu; they must be"):
        model(four, positions=torch.arange(4, device="meta"))
    for far in (10**7, -(10**7), -(2**63)):
        with pytest.raises(ValueError, match=r"stays within the range of torch\.float64"):
            model(four, positions=torch.tensor([0, 1, 2, far]))
    without = LongNetLM(dataclasses.replace(config, positions="none"))
    with pytest.raises(ValueError, match='it must be None for a model with positions="none"'):
        without(four, positions=torch.arange(4))
    for value in ("False", None, 1):
        with pytest.raises(TypeError, match=f"is_causal is {value!r}; it must be True or False"):
            model(four, value)
    with pytest.raises(TypeError, match=r"LongNetLM\.forward has no argument 'causal'; it is call"):
        model(four, causal=False)
    with pytest.raises(TypeError, match="no argument 'dropout'; it is an option of the construct"):
        model(four, dropout=0.1)
    with pytest.raises(ValueError, match="no-such-backend"):
        LongNetLM(dataclasses.replace(config, backend="no-such-backend"))(four)


@pytest.mark.parametrize("token", [-1, 61, 2**40])
@pytest.mark.parametrize("packed", [False, True])
def test_unknown_tokens_are_refused(model, token, packed):
    tokens = torch.tensor([1, 60, token, 2])
    bounds = torch.tensor([0, 4]) if packed else None
    with pytest.raises(ValueError, match=rf"tokens holds {token}; .* below num_tokens, here 61"):
        model(tokens if packed else tokens[None], cu_seqlens=bounds)


@pytest.mark.slow  # vmap imports the compiler: five CPU-seconds
def test_tokens_are_not_read_where_they_have_no_values(model):
    """A transform could not go on after a read."""
    tokens = torch.tensor([[1, 2, 3], [4, 5, 60]])
    expected = model(tokens)
    mapped = torch.vmap(lambda row: model(row[None])[0])(tokens)
    torch.testing.assert_close(mapped, expected)


def test_it_learns_a_pattern_by_heart():
    torch.manual_seed(0)
    model = LongNetLM(
        num_tokens=16,
        d_model=32,
        nhead=4,
        num_decoder_layers=1,
        dim_feedforward=64,
        segment_lengths=[8, 32],
        dilation_rates=[1, 2],
    )
    tokens = torch.randint(16, (1, 33))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(80):
        loss = torch.nn.functional.cross_entropy(
            model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten()
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] > 2.5
    assert losses[-1] < 0.05


def test_a_long_context_is_used():
    """The first token decides the loss of the last one, far beyond the shortest segment."""
    config = LongNetConfig(
        num_tokens=8,
        d_model=16,
        nhead=2,
        num_decoder_layers=2,
        dim_feedforward=16,
        segment_lengths=(4, 64),
        dilation_rates=(1, 2),
    )
    torch.manual_seed(0)
    model = LongNetLM(config, dtype=torch.float64)
    tokens = torch.zeros(1, 63, dtype=torch.int64)
    other = tokens.clone()
    other[0, 0] = 1
    assert (model(tokens) - model(other))[0, -1].abs().max() > 1e-6
