"""A model with a sliding window of near tokens beside its branches."""

import dataclasses

import pytest
import torch
from dilated_models import ContextParallel, GenerationCache, LongNetConfig, LongNetLM, generate
from dilated_models.drawing.prompt_attention import attend_to_prompt


def made(**options) -> LongNetLM:
    torch.manual_seed(0)
    fields = {
        "num_tokens": 11,
        "d_model": 16,
        "nhead": 4,
        "num_decoder_layers": 2,
        "dim_feedforward": 24,
        "segment_lengths": [8, 32],
        "dilation_rates": [1, 4],
        "local_window": 5,
    }
    return LongNetLM(LongNetConfig(**fields | options), dtype=torch.float64)


def test_a_window_over_everything_makes_the_model_dense() -> None:
    tokens = torch.randint(11, (2, 30), generator=torch.Generator().manual_seed(1))
    dense = made(local_window=0, segment_lengths=[30], dilation_rates=[1])
    windowed = made(local_window=30)
    windowed.load_state_dict(dense.state_dict())
    torch.testing.assert_close(windowed(tokens), dense(tokens))
    assert not torch.allclose(made(local_window=4)(tokens), dense(tokens))


def test_a_token_behind_a_border_sees_the_one_before_it() -> None:
    tokens = torch.arange(20)[None] % 11
    changed = tokens.clone()
    changed[0, 7] += 1  # the last token of the first segment
    branches = {"segment_lengths": [8], "dilation_rates": [1]}
    for window, sees in ((0, False), (2, True)):
        model = made(local_window=window, num_decoder_layers=1, **branches)
        same = torch.equal(model(tokens)[0, 8], model(changed)[0, 8])
        assert same is not sees
        assert torch.equal(model(tokens)[0, :7], model(changed)[0, :7])


def test_packed_documents_are_as_alone_and_every_parameter_learns() -> None:
    model = made()
    tokens = torch.randint(11, (41,), generator=torch.Generator().manual_seed(1))
    bounds = torch.tensor([0, 13, 13, 41])
    packed = model(tokens, cu_seqlens=bounds)
    alone = torch.cat([model(tokens[None, a:b])[0] for a, b in ((0, 13), (13, 41))])
    torch.testing.assert_close(packed, alone)
    packed.square().mean().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())


@pytest.mark.parametrize(
    "options",
    [
        {"positions": "rotary", "num_kv_heads": 2, "key_conv": 3},
        # The center of xPos moves, and the window reaches farther than the segments.
        {"xpos_scale_base": 0.12, "local_window": 37, "segment_lengths": [8, 12]},
    ],
)
def test_a_cache_continues_as_the_whole_text(options: dict) -> None:
    model = made(**options)
    tokens = torch.randint(11, (3, 90), generator=torch.Generator().manual_seed(1))
    whole = [model(tokens[:, :n])[:, -1] for n in range(1, 91)]
    cache = GenerationCache(model, 3)
    lengths = [5, 17, 16]
    last = model(tokens[:, :17], cache=cache, lengths=lengths)
    for step in range(72):
        for text, length in enumerate(lengths):
            torch.testing.assert_close(last[text, 0], whole[length + step - 1][text])
        now = torch.stack([tokens[text, length + step] for text, length in enumerate(lengths)])
        last = model(now[:, None], cache=cache)
    assert cache.positions == (77, 89, 88)
    cache.reorder([1])
    torch.testing.assert_close(model(tokens[1:2, 89:], cache=cache)[:, 0], whole[89][1:2])


def test_generation_takes_the_most_likely_tokens_of_the_whole_text() -> None:
    model, text = made(), [3, 1, 4]
    got = list(generate(model, text, max_new_tokens=9, temperature=0))
    for token in got:
        assert token == int(model(torch.tensor([text]))[0, -1].argmax())
        text = [*text, token]


def test_what_has_no_window_is_refused() -> None:
    model = made()
    with pytest.raises(ValueError, match="local_window of the model is 5; only"):
        attend_to_prompt(model, [1, 2], num_rows=1)
    with pytest.raises(ValueError, match="local_window is -1; it must be at least 0"):
        dataclasses.replace(model.config, local_window=-1)
    attention = model.blocks[0].attention
    with pytest.raises(ValueError, match="local_window of the model is 5, and context_parallel"):
        attention(torch.zeros(1, 4, 16).double(), context_parallel=object.__new__(ContextParallel))
