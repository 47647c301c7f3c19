"""LongViT and SlideChat: architectures, keys of their files, quirks."""

import math

import pytest
import torch
from dilated_models.checkpoints import encoder_from_slidechat, longvit_from_torchscale
from dilated_models.encoder.names import published_name
from dilated_models.encoder.stack import LongNetEncoder
from dilated_models.slide.longvit import LongViT


def published(module, prefix=""):
    return {prefix + published_name(name): w for name, w in module.state_dict().items()}


@pytest.fixture
def longvit() -> LongViT:
    torch.manual_seed(0)
    return LongViT(96, patch_size=16, embed_dim=32, depth=2, num_heads=4)


def test_longvit_small_is_the_published_architecture():
    model = LongViT(device="meta")
    assert model.pos_embed.shape == (1, 1024, 384)
    assert model.encoder.config.pattern.segment_lengths == (64, 128, 256, 512, 1024)
    assert isinstance(model.encoder.layer_norm, torch.nn.Identity)
    large = LongViT(32768, device="meta").encoder.config
    assert large.pattern.segment_lengths == (1024, 4096, 32768, 262144, 1048576)
    with torch.no_grad():
        assert model(torch.empty(1, 3, 1024, 1024, device="meta")).shape == (1, 1024, 384)


@pytest.mark.parametrize("prefix", ["", "backbone.", "module.backbone."])
def test_longvit_from_the_file_of_the_pretraining(longvit, tmp_path, prefix):
    images = torch.randn(1, 3, 96, 96)
    head = {prefix.replace("backbone.", "") + "head.mlp.0.weight": torch.ones(3)}
    content = {"teacher": published(longvit, prefix) | head, "student": {}, "epoch": 3}
    torch.save(content, tmp_path / "longvit.pth")
    model = longvit_from_torchscale(tmp_path / "longvit.pth", num_heads=4)
    with torch.no_grad():
        assert torch.equal(model(images), longvit.eval()(images))
    weights = published(longvit)
    del weights["encoder.layers.1.ffn.ffn_layernorm.bias"]
    with pytest.raises(ValueError, match=r"layers\.1\.ffn\.ffn_layernorm\.bias is missing"):
        longvit_from_torchscale(weights, num_heads=4)
    with pytest.raises(ValueError, match="those of a LongViT"):
        longvit_from_torchscale({"w": torch.ones(1)})


def test_longvit_resizes_its_positions_as_the_published_code(longvit):
    w0, h0, side, dim = 8 + 0.1, 5 + 0.1, 6, 32  # of an image of 128 × 80 pixels
    table = longvit.pos_embed.reshape(1, side, side, dim).permute(0, 3, 1, 2)
    factors = (w0 / math.sqrt(side**2), h0 / math.sqrt(side**2))
    table = torch.nn.functional.interpolate(table, scale_factor=factors, mode="bicubic")
    expected = table.permute(0, 2, 3, 1).reshape(1, -1, dim)
    images = torch.randn(2, 3, 128, 80)
    patches = longvit.patch_embed.proj(images).flatten(2).transpose(1, 2)
    torch.testing.assert_close(longvit(images), longvit.encoder(patches + expected))
    larger = longvit_from_torchscale(published(longvit), image_size=192, num_heads=4)
    assert larger.pos_embed.shape == (1, 144, 32)
    with pytest.raises(ValueError, match="multiples of the patch size 16"):
        longvit(torch.randn(2, 3, 100, 96))


@pytest.mark.parametrize("prefix", ["", "LongNet_encoder."])
def test_slidechat_lets_no_tile_see_another(tmp_path, prefix):
    torch.manual_seed(0)
    made = LongNetEncoder(
        d_model=32,
        nhead=8,
        num_layers=2,
        dim_feedforward=48,
        segment_lengths=[1024, 2048, 4096, 8192, 16384],
        dilation_rates=[1, 2, 4, 8, 16],
        head_offsets="blocked",
        padding="attended",
    ).eval()
    weights = published(made, prefix) | ({"llm.weight": torch.ones(1)} if prefix else {})
    torch.save({"state_dict": weights}, tmp_path / "slidechat.pth")
    encoder = encoder_from_slidechat(tmp_path / "slidechat.pth")
    tiles = torch.randn(1, 50, 32)
    with torch.no_grad():
        out = encoder(tiles)
        assert torch.equal(out, made(tiles[0][:, None])[:, 0][None])
        torch.testing.assert_close(encoder(tiles[:, 7:8]), out[:, 7:8])
        # A sequence of one tile: every head returns the tile's own value.
        layer = encoder.encoder.layers[0]
        value = layer.self_attn.v_proj(layer.self_attn_layer_norm(tiles))
        x = tiles + layer.self_attn.out_proj(layer.self_attn.layer_norm(value))
        x = x + layer.ffn(layer.final_layer_norm(x))
        torch.testing.assert_close(layer(tiles[0][:, None])[:, 0], x[0])
        seen = encoder_from_slidechat(tmp_path / "slidechat.pth", as_sequence=True)(tiles)
        torch.testing.assert_close(seen, made(tiles))
    assert not torch.allclose(seen, out, atol=1e-2)
    with pytest.raises(ValueError, match="those of a LongNet encoder"):
        encoder_from_slidechat({"w": torch.ones(1)})
