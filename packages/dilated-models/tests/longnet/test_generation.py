"""Sampling: exact distributions, reproducible draws, several texts at once, refusals."""

import collections
import dataclasses

import pytest
import torch
from dilated_models import GenerationCache, LongNetLM, generate, generate_batch


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"positions": "rotary"},
        {"positions": "none", "key_conv": 4},
        {"padding": "attended", "key_conv": 2},
        {"head_offsets": "blocked", "segment_lengths": (16,), "dilation_rates": (3,)},
    ],
)
def test_greedy_is_the_argmax_of_full_forwards(config, changes):
    torch.manual_seed(0)
    model = LongNetLM(dataclasses.replace(config, **changes), dtype=torch.float64)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)  # key_conv is drawn as zeros, the identity
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
    n = 300
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


def test_each_module_keeps_its_mode(model):
    model.train()
    model.blocks[0].eval()
    modes = [module.training for module in model.modules()]
    for _ in generate(model, [5], max_new_tokens=3):
        assert [module.training for module in model.modules()] == modes
    with pytest.raises(ValueError, match="tokens holds 1000000"):
        model(torch.tensor([[10**6]]), cache=GenerationCache(model))
    assert [module.training for module in model.modules()] == modes


def test_dropout_is_off_while_another_text_ends(config):
    model = LongNetLM(dataclasses.replace(config, dropout=0.5)).train()
    expected = list(generate(model, [5], max_new_tokens=8, temperature=0))
    long = generate(model, [5], max_new_tokens=8, temperature=0)
    short = generate(model, [5], max_new_tokens=2, temperature=0)
    tokens = [next(long)]
    list(short)
    model.train()
    assert [*tokens, *long] == expected
    assert model.training


@pytest.mark.parametrize("options", [{"temperature": 0}, {}, {"top_k": 2}, {"top_p": 0.5}])
def test_logits_without_a_largest_are_refused(model, options):
    for value in (float("nan"), float("inf")):
        torch.nn.init.constant_(model.output.weight, value)
        with pytest.raises(ValueError, match=r"the largest logit is (nan|inf); it must be finite"):
            list(generate(model, [5], max_new_tokens=1, **options))


@pytest.mark.parametrize("prompt", [None, 5, {1: 2}, {1, 2}, "12"])
def test_a_prompt_is_a_list(model, prompt):
    with pytest.raises(TypeError, match=r"prompt is .*; it must be a list of token ids"):
        generate(model, prompt, max_new_tokens=1)
    with pytest.raises(TypeError, match=r"prompts\[1\] is .*; it must be a list of token ids"):
        generate_batch(model, [[1], prompt], max_new_tokens=1)
    with pytest.raises(TypeError, match=r"prompts is .*; it must be a list of prompts"):
        generate_batch(model, prompt, max_new_tokens=1)


def test_a_prompt_has_values(model):
    with pytest.raises(ValueError, match="prompt is on meta and holds no values"):
        generate(model, torch.tensor([5], device="meta"), max_new_tokens=1)


def test_a_model_is_a_language_model():
    with pytest.raises(TypeError, match="model is a Linear; it must be a LongNetLM"):
        generate(torch.nn.Linear(1, 1), [5], max_new_tokens=1)
    with pytest.raises(TypeError, match="model is a NoneType; it must be a LongNetLM"):
        GenerationCache(None)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompt": []}, "prompt is empty; it must hold at least one token"),
        ({"prompt": [61]}, "a token of prompt is 61; it must be at most 60"),
        ({"prompt": [-1]}, "a token of prompt is -1; it must be at least 0"),
        ({"max_new_tokens": 0}, "max_new_tokens is 0; it must be at least 1"),
        ({"temperature": -1.0}, r"temperature is -1\.0; it must be at least 0"),
        ({"temperature": float("nan")}, "temperature is nan; it must be finite"),
        ({"seed": 2**64}, "seed is 18446744073709551616; it must be at most"),
        ({"top_k": 0}, "top_k is 0; it must be at least 1"),
        ({"top_p": 0.0}, r"top_p is 0\.0; it must be above 0"),
        ({"top_p": 1.1}, r"top_p is 1\.1; it must be .*at most 1"),
    ],
)
def test_refusals_come_at_the_call(model, change, message):
    arguments = {"prompt": [1], "max_new_tokens": 1} | change
    with pytest.raises(ValueError, match=message):
        generate(model, arguments.pop("prompt"), **arguments)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompt": "def"}, "prompt is 'def'; it must be a list of token ids"),
        ({"prompt": [1.0]}, r"a token of prompt is 1\.0; it must be an integer"),
        ({"max_new_tokens": 2.5}, r"max_new_tokens is 2\.5; it must be an integer"),
        ({"temperature": "1"}, "temperature is '1'; it must be a number"),
        ({"top_k": True}, "top_k is True; it must be an integer"),
        ({"seed": None}, "seed is None; it must be an integer"),
        ({"top_p": "1"}, "top_p is '1'; it must be a number"),
        ({"cache": {}}, "cache is a dict; it must be a GenerationCache"),
    ],
)
def test_wrong_types_are_refused_at_the_call(model, change, message):
    arguments = {"prompt": [1], "max_new_tokens": 1} | change
    with pytest.raises(TypeError, match=message):
        generate(model, arguments.pop("prompt"), **arguments)


@pytest.mark.parametrize("top_p", [0.02, 0.3, 0.999])
def test_top_p_draws_among_the_likeliest_tokens(model, top_p):
    with torch.no_grad():
        probabilities = model(torch.tensor([[5, 6]]))[0, -1].softmax(-1)
    ordered = probabilities.sort(descending=True)
    # The fewest tokens whose probabilities add up to top_p.
    count = int((ordered.values.cumsum(-1) < top_p).sum()) + 1
    allowed = set(ordered.indices[:count].tolist())
    draws = {
        token
        for seed in range(300)
        for token in generate(model, [5, 6], max_new_tokens=1, top_p=top_p, seed=seed)
    }
    assert draws <= allowed
    assert len(draws) > len(allowed) / 3
    both = {
        token
        for seed in range(100)
        for token in generate(model, [5, 6], max_new_tokens=1, top_p=top_p, top_k=2, seed=seed)
    }
    assert both <= set(ordered.indices[: min(2, count)].tolist())


PROMPTS = [[3, 1, 4], list(range(50)), [7], [3, 1, 4], [9, 9], list(range(49, 0, -1))]


@pytest.mark.parametrize("options", [{"temperature": 0}, {"temperature": 0.8, "top_p": 0.9}])
def test_texts_of_a_batch_are_each_alone(model, options):
    """Whatever the neighbours are: other lengths, another order, none."""
    steps = generate_batch(model, PROMPTS, max_new_tokens=60, seed=5, **options)
    texts = list(zip(*steps, strict=True))
    for i, (prompt, text) in enumerate(zip(PROMPTS, texts, strict=True)):
        alone = generate(model, prompt, max_new_tokens=60, seed=5 + i, **options)
        assert list(alone) == list(text)
    if options["temperature"]:
        assert texts[0] != texts[3]  # equal prompts, with draws of their own


def test_seeds_of_a_batch_go_on_from_zero_after_the_largest(model):
    largest = 2**64 - 1
    (step,) = generate_batch(model, [[1], [2]], max_new_tokens=1, seed=largest)
    assert step == (
        next(generate(model, [1], max_new_tokens=1, seed=largest)),
        next(generate(model, [2], max_new_tokens=1, seed=0)),
    )


def test_a_text_goes_on_in_its_cache(model):
    whole = list(generate(model, [3, 1, 4], max_new_tokens=20, temperature=0))
    cache = GenerationCache(model)
    first = list(generate(model, [3, 1, 4], max_new_tokens=8, temperature=0, cache=cache))
    rest = list(generate(model, first[-1:], max_new_tokens=12, temperature=0, cache=cache))
    assert first + rest == whole
    with pytest.raises(ValueError, match="cache holds 2 texts; it must hold 1"):
        generate(model, [1], max_new_tokens=1, cache=GenerationCache(model, 2))


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ([], "prompts is empty; it must hold at least one prompt"),
        ([[1], []], r"prompts\[1\] is empty; it must hold at least one token"),
        ([[1], [61]], r"a token of prompts\[1\] is 61; it must be at most 60"),
    ],
)
def test_refusals_of_a_batch_come_at_the_call(model, prompts, message):
    with pytest.raises(ValueError, match=message):
        generate_batch(model, prompts, max_new_tokens=1)


def test_a_prompt_may_be_bytes_or_a_tensor(model):
    expected = list(generate(model, [5, 6], max_new_tokens=4))
    for prompt in (bytes([5, 6]), torch.tensor([5, 6]), (5, 6)):
        assert list(generate(model, prompt, max_new_tokens=4)) == expected
