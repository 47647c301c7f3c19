"""The slide encoder: slides of different sizes, pooling, states, devices."""

import pytest
import torch
from dilated_models.slide.encoder import LongNetSlideEncoder

OPTIONS = {
    "in_chans": 12,
    "embed_dim": 16,
    "depth": 3,
    "num_heads": 4,
    "segment_lengths": [8, 20, 64],
    "dilation_rates": [1, 2, 4],
}


def make(**options) -> LongNetSlideEncoder:
    torch.manual_seed(0)
    return LongNetSlideEncoder(**OPTIONS, **options, dtype=torch.float64).eval()


def slide(count: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    tiles = torch.randn(count, 12, generator=generator, dtype=torch.float64)
    return tiles, torch.randint(40, (count, 2), generator=generator) * 256


@pytest.mark.parametrize("all_layers", [False, True])
@pytest.mark.parametrize("global_pool", [False, True])
def test_slides_of_a_ragged_batch_are_as_if_alone(global_pool, all_layers):
    encoder = make(global_pool=global_pool)
    slides = [slide(count, count) for count in (50, 1, 7, 31)]
    alone = [encoder(tiles[None], coords[None], all_layers) for tiles, coords in slides]
    expected = torch.cat(alone, dim=-2)
    tiles, coords = zip(*slides, strict=True)
    got = encoder(list(tiles), list(coords), all_layers)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)
    padded = torch.full((4, 60, 12), 1e6, dtype=torch.float64)
    where = torch.full((4, 60, 2), -1)
    mask = torch.ones(4, 60, dtype=torch.bool)
    for i, (own, corner) in enumerate(slides):
        rows = torch.arange(len(own)) + i  # padding on both sides
        padded[i, rows], where[i, rows], mask[i, rows] = own, corner, False
    got = encoder(padded, where, all_layers, key_padding_mask=mask)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)


def test_gradients_of_a_ragged_batch_are_those_of_its_slides():
    encoder = make(global_pool=True)
    slides = [slide(count, count) for count in (20, 3)]
    parameters = list(encoder.parameters())
    upstream = torch.randn(2, 16, dtype=torch.float64)
    tiles, coords = zip(*slides, strict=True)
    # The mean over tiles does not read the last class token's own output.
    got = torch.autograd.grad(encoder(list(tiles), list(coords)), parameters, upstream)
    each = [
        torch.autograd.grad(encoder(t[None], c[None]), parameters, upstream[i, None])
        for i, (t, c) in enumerate(slides)
    ]
    expected = [sum(parts) for parts in zip(*each, strict=True)]
    torch.testing.assert_close(list(got), expected, rtol=0, atol=1e-10)


def test_layers_are_pooled_before_the_final_norm():
    encoder, (tiles, coords) = make(global_pool=True), slide(30)
    layers = encoder(tiles[None], coords[None], all_layers=True)
    states = encoder.tile_states(tiles[None], coords[None], layers=[0, 1, -1])
    torch.testing.assert_close(layers[[0, 1, 3]], encoder.norm(states.mean(2)))
    final = encoder.tile_states(tiles[None], coords[None])
    torch.testing.assert_close(final, encoder.encoder.layer_norm(states[-1]))
    plain = encoder(tiles[None], coords[None])
    torch.testing.assert_close(plain, encoder.norm(final.mean(1)))
    assert not torch.allclose(layers[-1], plain, atol=1e-3)
    with pytest.raises(ValueError, match="at most 3"):
        encoder.tile_states(tiles[None], coords[None], layers=[4])


def test_order_and_cells_count_and_tile_size_may_be_set():
    encoder, (tiles, coords) = make(), slide(50)
    embedding = encoder(tiles[None], coords[None])
    assert not torch.allclose(encoder(tiles[None].flip(1), coords[None].flip(1)), embedding)
    assert torch.equal(encoder(tiles[None], coords[None] + 255), embedding)
    assert torch.equal(encoder(tiles[None], coords[None].float()), embedding)
    encoder.tile_size = 512
    assert torch.equal(encoder(tiles[None], coords[None] * 2), embedding)
    assert encoder.config.pattern.segment_lengths == (8, 20, 64)
    with pytest.raises(ValueError, match="tile_size is 0"):
        encoder.tile_size = 0


def test_fresh_weights_are_those_of_the_published_code():
    encoder = LongNetSlideEncoder(**OPTIONS, device="meta").to_empty(device="cpu")
    for parameter in encoder.parameters():
        torch.nn.init.constant_(parameter, torch.nan)
    encoder.reset_parameters()
    assert all(parameter.isfinite().all() for parameter in encoder.parameters())
    weight = encoder.encoder.layers[0].ffn.fc1.weight
    bound = (6 / (16 + 64)) ** 0.5  # gain 1: the published code replaces MAGNETO's gains
    assert 0.9 * bound < weight.abs().max() <= bound
    assert encoder.cls_token.std() < 0.05


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_by_dtype_and_by_autocast(dtype):
    encoder, (tiles, coords) = make(), slide(50)
    expected = encoder(tiles[None], coords[None])
    half = make().to(dtype)(tiles[None].to(dtype), coords[None])
    assert half.dtype == dtype
    torch.testing.assert_close(half.double(), expected, rtol=0, atol=0.15)
    with torch.autocast("cpu", dtype):
        got = make().float()(tiles[None].float(), coords[None])
    torch.testing.assert_close(got.double(), expected, rtol=0, atol=0.15)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda t, c: (t[..., :5], c), ValueError, "12 channels"),
        (lambda t, c: (t, c[..., :1]), ValueError, r"must be \(1, 9, 2\)"),
        (lambda t, c: (t[:, :0], c[:, :0]), ValueError, "at least one"),
        (lambda t, c: (t.long(), c), TypeError, "must be floating"),
        (lambda t, c: (t, c == 0), TypeError, "integers or floating"),
        (lambda t, c: (t, [c[0]]), TypeError, "both be tensors"),
        (lambda t, c: ([t[0]], []), ValueError, "equally many"),
        (lambda t, c: ([], []), ValueError, "at least one"),
        (lambda t, c: (t, c + 256_000), ValueError, "outside the grid"),
        (lambda t, c: (t, c - 1), ValueError, "outside the grid"),
    ],
)
def test_bad_inputs_are_refused(change, error, message):
    tiles, _ = slide(9)
    coords = torch.arange(18).view(1, 9, 2)
    with pytest.raises(error, match=message):
        make()(*change(tiles[None], coords))


def test_bad_masks_and_names_are_refused():
    encoder, (tiles, coords) = make(), slide(9)
    with pytest.raises(ValueError, match="must be bool of shape"):
        encoder(tiles[None], coords[None], key_padding_mask=torch.zeros(1, 9))
    with pytest.raises(ValueError, match="has no padding"):
        encoder([tiles], [coords], key_padding_mask=torch.zeros(1, 9, dtype=torch.bool))
    with pytest.raises(TypeError, match="no argument 'all_layer_embed'"):
        encoder(tiles[None], coords[None], all_layer_embed=True)
    with pytest.raises(TypeError, match="give norm_eps"):
        LongNetSlideEncoder(**OPTIONS, norm_layer=torch.nn.LayerNorm)


@pytest.mark.slow  # imports the compiler
def test_compiles_to_one_graph():
    encoder, (tiles, coords) = make(), slide(30)
    compiled = torch.compile(encoder, fullgraph=True, backend="eager")
    got = compiled(tiles[None], coords[None], all_layers=True)
    torch.testing.assert_close(got, encoder(tiles[None], coords[None], all_layers=True))
