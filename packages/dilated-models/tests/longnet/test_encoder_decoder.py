"""LongNet of two sequences: the definition, padding, causality, generation, files."""

import copy
import dataclasses

import pytest
import torch
from dilated_models import (
    EncoderDecoderConfig,
    GenerationCache,
    LongNet,
    LongNetLM,
    generate,
    generate_from,
    load_model,
)
from dilated_models.longnet import generation_cache
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch.nn.functional import cross_entropy

OPTIONS = {
    "d_model": 32, "nhead": 4, "num_encoder_layers": 2, "num_decoder_layers": 2,
    "dim_feedforward": 48, "segment_lengths": (6, 16, 40), "dilation_rates": (1, 3, 4),
}  # fmt: skip


def made(**changes) -> LongNet:
    torch.manual_seed(0)
    model = LongNet(**(OPTIONS | {"num_tokens": 61} | changes), dtype=torch.float64)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.1)
    return model


def text(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randint(61, shape, generator=torch.Generator().manual_seed(seed))


@given(
    N=st.integers(1, 45),
    M=st.integers(1, 45),
    changes=st.sampled_from(
        [
            {"num_kv_heads": 2, "positions": "xpos", "xpos_scale_base": 30.0},
            {"num_tokens": 0, "head_offsets": "blocked", "padding": "attended"},
            {"positions": "none", "tie_embeddings": True, "activation": "gelu"},
        ]
    ),
    flags=st.tuples(st.booleans(), st.booleans(), st.booleans()),
)
@example(N=45, M=1, changes={}, flags=(False, True, False))
@settings(max_examples=8, deadline=None, derandomize=True, database=None)
def test_equals_the_definition_forward_and_backward(naive_class, N, M, changes, flags):
    model = made(**changes)
    src_is_causal, tgt_is_causal, memory_is_causal = flags
    M = N if memory_is_causal else M
    src, tgt = text(2, N), text(2, M, seed=2)
    if not model.config.num_tokens:
        generator = torch.Generator().manual_seed(3)
        src, tgt = (torch.randn(*x.shape, 32, generator=generator).double() for x in (src, tgt))
    out = model(
        src,
        tgt,
        src_is_causal=src_is_causal,
        tgt_is_causal=tgt_is_causal,
        memory_is_causal=memory_is_causal,
    )
    definition = naive_class(model.config, dict(model.state_dict(keep_vars=True)))
    memory = definition.encode(src, src_is_causal)
    expected = definition.decode(tgt, memory, tgt_is_causal, memory_is_causal)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-10)
    upstream = torch.randn(out.shape[::-1], dtype=torch.float64).permute(2, 1, 0)
    found, wanted = (
        torch.autograd.grad(y, list(model.parameters()), upstream) for y in (out, expected)
    )
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-9)


def test_one_sequence_and_causal_is_a_language_model(config):
    lm = LongNetLM(dataclasses.replace(config, num_encoder_layers=2), dtype=torch.float64)
    model = made(positions="xpos")
    model.load_state_dict(lm.state_dict())
    tokens = text(2, 40)
    causal = model(tokens, tokens, src_is_causal=True, memory_is_causal=True)
    torch.testing.assert_close(causal, lm(tokens), rtol=0, atol=1e-12)


def padded(rows: list[torch.Tensor], side: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of one length, and their mask; padding holds the last token or NaN."""
    longest = max(map(len, rows)) + 2
    shape = (len(rows), longest, *rows[0].shape[1:])
    fill = torch.nan if rows[0].is_floating_point() else 60
    batch, mask = rows[0].new_full(shape, fill), torch.ones(len(rows), longest, dtype=torch.bool)
    for b, row in enumerate(rows):
        at = torch.arange(len(row)) + (longest - len(row) if side == "left" else 0)
        if side == "inside" and len(row) > 3:
            at[len(row) // 2 :] += 1
        batch[b, at], mask[b, at] = row, False
    return batch, mask


@pytest.mark.parametrize("padding", ["masked", "attended"])
@pytest.mark.parametrize("side", ["left", "right", "inside"])
def test_padded_rows_are_as_alone(side, padding):
    model = made(padding=padding, key_conv=3, num_tokens=0)
    generator = torch.Generator().manual_seed(3)
    srcs, tgts = (
        [torch.randn(n, 32, generator=generator).double().requires_grad_() for n in lengths]
        for lengths in ((30, 1, 17), (12, 25, 1))
    )
    src, src_mask = padded(srcs, side)
    tgt, tgt_mask = padded(tgts, side)
    out = model(src, tgt, src_mask, tgt_mask)
    assert out[tgt_mask].eq(0).all()
    alone = torch.cat([model(s[None], t[None])[0] for s, t in zip(srcs, tgts, strict=True)])
    torch.testing.assert_close(out[~tgt_mask], alone, rtol=0, atol=1e-11)
    upstream = torch.randn(alone.shape, generator=generator).double()
    inputs = [*srcs, *tgts]
    found, wanted = (torch.autograd.grad(y, inputs, upstream) for y in (out[~tgt_mask], alone))
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-10)
    # Padding of the source alone: the decoder is then not packed.
    only = model(src, torch.stack([tgts[0]] * 3), src_mask)
    alone = torch.cat([model(s[None], tgts[0][None]) for s in srcs])
    torch.testing.assert_close(only, alone, rtol=0, atol=1e-11)


def test_the_loss_is_that_of_the_logits():
    model = made(tie_embeddings=True)
    src, src_mask = padded([text(30)[:n] for n in (30, 2, 17)], "left")
    rows = [text(25, seed=2)[:n] for n in (12, 25, 1)]
    tgt, tgt_mask = padded(rows, "left")
    logits = model(src, tgt, src_mask, tgt_mask)
    labels = torch.full_like(tgt, -100)
    labels[:, :-1] = tgt[:, 1:].masked_fill(tgt_mask[:, :-1], -100)
    expected = cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none").view(3, -1)
    masks = {"src_key_padding_mask": src_mask, "tgt_key_padding_mask": tgt_mask}
    for chosen in (None, labels):
        each = model.loss(src, tgt, chosen, **masks, reduction="none")
        torch.testing.assert_close(each, expected, rtol=0, atol=1e-11)
    weights = list(model.parameters())
    mean = expected.sum() / (labels != -100).sum()
    found, wanted = (
        torch.autograd.grad(loss, weights) for loss in (model.loss(src, tgt, **masks), mean)
    )
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-10)
    plain = cross_entropy(model(src, tgt)[:, :-1].flatten(0, 1), tgt[:, 1:].flatten())
    torch.testing.assert_close(model.loss(src, tgt), plain, rtol=0, atol=1e-11)
    states = torch.randn(3, 5, 32).double()
    with pytest.raises(ValueError, match="tgt holds embeddings; give the labels"):
        model.loss(src, states)
    with pytest.raises(ValueError, match="a loss needs a model that scores tokens"):
        made(num_tokens=0).loss(states, states, tgt[:, :5])
    assert model.loss(src, states, tgt[:, :5]).isfinite()
    with pytest.raises(ValueError, match="there must be one label for each position"):
        model.loss(src, tgt, labels[:, 1:])


def test_a_target_sees_all_of_its_source_and_nothing_later():
    model, src, tgt = made(), text(1, 50), text(1, 20, seed=2)
    with torch.no_grad():
        logits = model(src, tgt)
        for t in range(20):
            changed = tgt.clone()
            changed[0, t] = (tgt[0, t] + 1) % 61
            difference = (model(src, changed) - logits).abs()[0].amax(-1)
            assert difference[:t].eq(0).all()
            assert difference[t] > 1e-3
        for s in (0, 23, 49):
            changed = src.clone()
            changed[0, s] = (src[0, s] + 1) % 61
            assert (model(changed, tgt) - logits).abs()[0].amax(-1).min() > 1e-6


@pytest.mark.parametrize(
    "changes",
    [
        {"num_kv_heads": 2},
        {"positions": "xpos", "xpos_scale_base": 0.2, "key_conv": 4, "backend": "eager"},
        {"attention_kind": "block_sparse", "attention_options": {"block_size": 4},
         "segment_lengths": (2048, 4096, 8192, 16384, 32768), "dilation_rates": (1, 2, 4, 6, 12)},
    ],
    ids=lambda changes: next(iter(changes)),
)  # fmt: skip
def test_steps_are_rows_of_the_full_forward(changes, monkeypatch):
    monkeypatch.setattr(generation_cache, "_TOKENS_PER_PART", 21)
    model, tgt = made(**changes).eval(), text(3, 100, seed=2)
    src, mask = padded([text(30)[:n] for n in (30, 2, 17)], "left")
    with torch.no_grad():
        whole = model(src, tgt, mask)
        memory = model.encode(src, mask)
        first = GenerationCache(model, memory=memory, memory_key_padding_mask=mask)
    cache, lengths = copy.copy(first), [5, 81, 80]
    last = model.step(tgt[:, :81], cache, lengths)
    for step in range(10):
        expected = torch.stack([whole[b, n + step - 1] for b, n in enumerate(lengths)])
        torch.testing.assert_close(last[:, 0], expected, rtol=0, atol=1e-10)
        now = torch.stack([tgt[b, n + step] for b, n in enumerate(lengths)])
        last = model.step(now[:, None], cache)
    cache.reorder([2, 0])
    last = model.step(torch.stack([tgt[2, 90:93], tgt[0, 15:18]]), cache)
    expected = torch.stack([whole[2, 92], whole[0, 17]])
    torch.testing.assert_close(last[:, 0], expected, rtol=0, atol=1e-10)
    cache.reset()  # of the targets; sources stay
    last = model.step(tgt[[2, 0], :9], cache)
    torch.testing.assert_close(last[:, 0], whole[[2, 0], 8], rtol=0, atol=1e-10)
    assert first.positions == (0, 0, 0)
    assert first.nbytes > 0


def test_generation_is_the_argmax_of_full_forwards():
    model = made()
    srcs, prompts = [text(30)[:n] for n in (30, 2, 17)], [[0], [0, 7, 7], [3, 1]]
    src, mask = padded(srcs, "left")
    options = {"max_new_tokens": 6, "temperature": 0}
    steps = generate_from(model, src, prompts, src_key_padding_mask=mask, **options)
    found = list(zip(*steps, strict=True))
    for row, prompt, tokens in zip(srcs, prompts, found, strict=True):
        alone = [t for (t,) in generate_from(model, row[None], [prompt], **options)]
        assert alone == list(tokens)
        for i, token in enumerate(tokens):
            tgt = torch.tensor([[*prompt, *tokens[:i]]])
            assert model(row[None], tgt)[0, -1].argmax() == token
    assert model.training
    drawn = [
        list(generate_from(model, src[:1], [[0]], max_new_tokens=9, seed=s)) for s in (1, 1, 2)
    ]
    assert drawn[0] == drawn[1] != drawn[2]


@pytest.mark.parametrize("kind", ["moba", "nsa"])
def test_attention_that_is_causal_only_needs_a_causal_source(kind):
    branches = ("segment_lengths", "dilation_rates")
    options = {name: value for name, value in OPTIONS.items() if name not in branches}
    torch.manual_seed(0)
    model = LongNet(**options, num_tokens=61, attention_kind=kind).eval()
    src, steps = text(1, 40), {"max_new_tokens": 3, "temperature": 0}
    with pytest.raises(ValueError, match="pass is_causal=True"):
        model(src, src)
    found = [t for (t,) in generate_from(model, src, [[0]], src_is_causal=True, **steps)]
    for i, token in enumerate(found):
        tgt = torch.tensor([[0, *found[:i]]])
        assert model(src, tgt, src_is_causal=True)[0, -1].argmax() == token


def test_states_are_stepped_too():
    model = made(num_tokens=0).eval()
    src, tgt = torch.randn(2, 20, 32).double(), torch.randn(2, 9, 32).double()
    whole = model(src, tgt)
    cache = GenerationCache(model, memory=model.encode(src), max_seq_len=9)
    model.step(tgt[:, :5], cache)
    last = [model.step(tgt[:, [t]], cache) for t in range(5, 9)]
    torch.testing.assert_close(torch.cat(last, 1), whole[:, 5:].detach(), rtol=0, atol=1e-11)


@pytest.mark.parametrize("changes", [{"tie_embeddings": True}, {"num_tokens": 0}], ids=str)
def test_saved_and_loaded(tmp_path, changes):
    model = made(num_kv_heads=1, **changes).float().eval()
    config = model.config
    assert EncoderDecoderConfig.from_json(config.to_json()) == config
    model.save(tmp_path / "new")
    loaded = LongNet.load(tmp_path / "new")
    inputs = (text(1, 20), text(1, 9)) if config.num_tokens else torch.randn(2, 1, 9, 32).unbind()
    assert torch.equal(loaded(*inputs), model(*inputs))
    assert loaded.config == config
    with pytest.raises(ValueError, match=r"load it with dilated_models\.LongNet\.load"):
        load_model(tmp_path / "new")
    (tmp_path / "new" / "config.json").write_text(
        (tmp_path / "new" / "config.json").read_text().replace('"LongNet"', '"LongNetLM"')
    )
    with pytest.raises(ValueError, match=r"load it with dilated_models\.load_model"):
        LongNet.load(tmp_path / "new")


def test_bad_arguments_are_refused():
    model, src, tgt = made(), text(2, 20), text(2, 9)
    with pytest.raises(ValueError, match="num_encoder_layers is 0; it must be at least 1"):
        made(num_encoder_layers=0)
    with pytest.raises(ValueError, match="there is no embedding to share"):
        made(num_tokens=0, tie_embeddings=True)
    with pytest.raises(TypeError, match="is passed to forward, as src_is_causal"):
        made(is_causal=True)
    with pytest.raises(TypeError, match="no argument 'tgt_mask'"):
        model(src, tgt, tgt_mask=None)
    with pytest.raises(
        ValueError, match="tgt holds 61; each must be at least 0 and below num_tokens"
    ):
        model(src, torch.full_like(tgt, 61))
    with pytest.raises(ValueError, match=r"src has shape \(2, 20, 31\) and dtype torch\.float32"):
        model(torch.zeros(2, 20, 31), tgt)
    with pytest.raises(ValueError, match="it must be floating of shape"):
        made(num_tokens=0)(src, tgt)
    with pytest.raises(TypeError, match="src_key_padding_mask has dtype"):
        model(src, tgt, torch.zeros(2, 20))
    with pytest.raises(ValueError, match=r"tgt_key_padding_mask has shape \(2, 20\)"):
        model(src, tgt, None, torch.zeros(2, 20, dtype=torch.bool))
    with pytest.raises(ValueError, match="both must have the same length and the same padding"):
        model(src, tgt, memory_is_causal=True)
    with pytest.raises(ValueError, match="memory has 2 sequences"):
        model.decode(tgt[:1], model.encode(src))
    with pytest.raises(ValueError, match=r"give model\.encode\(src\)"):
        GenerationCache(model)
    with pytest.raises(ValueError, match="a LongNetLM makes its own"):
        GenerationCache(LongNetLM(**(OPTIONS | {"num_tokens": 9})), memory=model.encode(src))
    with pytest.raises(ValueError, match="made for a model with another configuration"):
        made(positions="none").step(tgt, GenerationCache(model, memory=model.encode(src)))
    with pytest.raises(ValueError, match="there must be one prompt for each source"):
        generate_from(model, src, [[0]], max_new_tokens=1)
    with pytest.raises(ValueError, match="it must be a LongNet with num_tokens"):
        generate_from(made(num_tokens=0), src, [[0]], max_new_tokens=1)
    with pytest.raises(TypeError, match="it must be a LongNetLM"):
        generate(model, [0], max_new_tokens=1)


@pytest.mark.exhaustive  # the compiler takes ten CPU-seconds
def test_one_graph_is_compiled():
    model, src, tgt = made(), text(2, 30), text(2, 20, seed=2)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    found, wanted = compiled(src, tgt), model(src, tgt)
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-12)
    weights = list(model.parameters())
    gradients = [torch.autograd.grad(out.square().sum(), weights) for out in (found, wanted)]
    torch.testing.assert_close(*gradients, rtol=1e-10, atol=1e-10)
