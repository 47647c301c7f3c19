"""Sampling: exact distributions, reproducible draws, refusals."""

import collections

import pytest
import torch
from dilated_models.generation import generate


def test_greedy_is_the_argmax_of_full_forwards(model):
    tokens = [3, 1, 4]
    for token in generate(model, [3, 1, 4], max_new_tokens=30, temperature=0):
        with torch.no_grad():
            assert token == model(torch.tensor([tokens]))[0, -1].argmax()
        tokens.append(token)
    assert len(tokens) == 33


def test_draws_depend_on_the_seed_alone(model):
    def draw(seed: int) -> list[int]:
        return list(generate(model, [7], max_new_tokens=20, seed=seed))

    first = draw(0)
    torch.manual_seed(99)
    state = torch.get_rng_state()
    assert draw(0) == first
    assert torch.equal(torch.get_rng_state(), state)
    assert draw(1) != first


@pytest.mark.parametrize(("temperature", "top_k"), [(1.0, None), (0.5, None), (1.0, 3)])
def test_the_first_token_is_drawn_from_the_models_distribution(model, temperature, top_k):
    with torch.no_grad():
        logits = model(torch.tensor([[5, 6]]))[0, -1] / temperature
    if top_k:
        logits[logits < logits.topk(top_k).values[-1]] = -torch.inf
    expected = logits.softmax(-1)
    n = 600
    counts = collections.Counter(
        token
        for seed in range(n)
        for token in generate(
            model, [5, 6], max_new_tokens=1, temperature=temperature, top_k=top_k, seed=seed
        )
    )
    for token in range(61):
        spread = (n * expected[token] * (1 - expected[token])).sqrt().item()
        assert abs(counts[token] - n * expected[token].item()) <= 4.5 * spread + 1e-9


def test_a_very_low_temperature_is_greedy(model):
    greedy = list(generate(model, [5], max_new_tokens=5, temperature=0))
    assert list(generate(model, [5], max_new_tokens=5, temperature=1e-300)) == greedy
    assert list(generate(model, [5], max_new_tokens=5, top_k=1)) == greedy
    assert len(list(generate(model, [5], max_new_tokens=2, top_k=1000))) == 2


def test_the_mode_is_restored(model):
    model.train()
    tokens = generate(model, [5], max_new_tokens=3)
    next(tokens)
    assert not model.training
    tokens.close()
    assert model.training


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompt": []}, "the prompt is empty; give at least one token"),
        ({"prompt": [61]}, "token 61 is not in the model's vocabulary of 61"),
        ({"prompt": [-1]}, "token -1 is not in the model's vocabulary"),
        ({"max_new_tokens": 0}, "max_new_tokens must be at least 1, got 0"),
        ({"temperature": -1.0}, r"temperature must be 0 or more and finite, got -1\.0"),
        ({"temperature": float("nan")}, "temperature must be 0 or more and finite, got nan"),
        ({"top_k": 0}, "top_k must be at least 1, got 0"),
    ],
)
def test_refusals_come_at_the_call(model, change, message):
    arguments = {"prompt": [1], "max_new_tokens": 1} | change
    with pytest.raises(ValueError, match=message):
        generate(model, arguments.pop("prompt"), **arguments)
