"""Configs of slide encoders: patterns from slide sizes, published architectures."""

import pytest
import torch
from dilated_models.slide.config import (
    ARCHITECTURES,
    SlideEncoderConfig,
    config_of,
    segment_lengths_for,
    with_options,
)
from dilated_models.slide.encoder import LongNetSlideEncoder


@pytest.mark.parametrize(
    ("max_wsi_size", "tile_size", "expected"),
    [
        (262_144, 256, (1024, 5792, 32768, 185363, 1048576)),
        (250_000, 256, (1024, 4870, 23170, 110217, 524288)),
        (16_384, 256, (1024, 1448, 2048, 2896, 4096)),
        (262_144, 512, (1024, 4096, 16384, 65536, 262144)),
        (8192, 256, (1024, 1024, 1024, 1024, 1024)),
        (4096, 256, (1024, 724, 512, 362, 256)),
    ],
)
def test_segment_lengths_of_the_published_code(max_wsi_size, tile_size, expected):
    numpy = pytest.importorskip("numpy")
    tiles = (max_wsi_size // tile_size) ** 2
    steps = numpy.linspace(numpy.log2(1024), int(numpy.log2(tiles)), 5)
    assert tuple(numpy.power(2, steps).astype(int).tolist()) == expected
    assert segment_lengths_for(max_wsi_size, tile_size) == expected


def test_the_pattern_follows_the_sizes_unless_it_is_given():
    config = config_of("gigapath_slide_enc12l768d", max_wsi_size=250_000)
    assert config.pattern.segment_lengths == (1024, 4870, 23170, 110217, 524288)
    assert config.pattern.head_offsets == "blocked"
    assert config.pattern.padding == "attended"
    own = with_options(config, segment_lengths=[8, 16], dilation_rates=[1, 2])
    assert own.pattern.segment_lengths == (8, 16)
    assert own.max_wsi_size is None
    assert with_options(own, tile_size=512).pattern == own.pattern
    five = with_options(own, segment_lengths=[8] * 5, dilation_rates=[1] * 5)
    assert with_options(five, max_wsi_size=16_384).pattern.segment_lengths[-1] == 4096
    with pytest.raises(ValueError, match="they must agree"):
        with_options(config, segment_lengths=[8] * 5, max_wsi_size=250_000)
    with pytest.raises(ValueError, match="must hold a tile"):
        SlideEncoderConfig(max_wsi_size=100)


@pytest.mark.parametrize(
    ("name", "depth", "width", "head_dim", "in_chans", "millions"),
    [
        ("gigapath_slide_enc12l768d", 12, 768, 48, 1536, 86.3),
        ("gigapath_slide_enc12l384d", 12, 384, 24, 384, 21.5),
        ("gigapath_slide_enc24l1024d", 24, 1024, 64, 1536, 304.1),
        ("gigapath_slide_enc12l1536d", 12, 1536, 96, 1536, 342.5),
    ],
)
def test_published_architectures(name, depth, width, head_dim, in_chans, millions):
    config = config_of(name)
    assert (config.depth, config.embed_dim, config.in_chans) == (depth, width, in_chans)
    assert config.embed_dim // config.num_heads == head_dim
    assert config.ffn_dim == 4 * width
    encoder = LongNetSlideEncoder(config, device="meta")
    count = sum(p.numel() for p in encoder.parameters())
    assert count / 1e6 == pytest.approx(millions, abs=0.1)
    tiles, coords = torch.empty(1, 50, in_chans, device="meta"), torch.empty(1, 50, 2).to("meta")
    with torch.no_grad():
        assert encoder.eval()(tiles, coords, all_layers=True).shape == (depth + 1, 1, width)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"embed_dim": 30}, ValueError, "multiple of 4"),
        ({"num_heads": 7}, ValueError, "nhead must divide"),
        ({"mlp_ratio": 4}, TypeError, "give ffn_dim"),
        ({"padding": "masked"}, TypeError, "leave it out"),
        ({"tile_size": 0}, ValueError, "at least 1"),
        ({"global_pool": 1}, TypeError, "True or False"),
    ],
)
def test_bad_options_are_refused(options, error, message):
    with pytest.raises(error, match=message):
        SlideEncoderConfig(**options)
    with pytest.raises(error, match=message):
        config_of("gigapath_slide_enc12l768d", **options)


def test_unknown_architectures_are_named():
    with pytest.raises(ValueError, match="gigapath_slide_enc12l384d"):
        config_of("longnet_enc12l768d")
    assert len(ARCHITECTURES) == 4
