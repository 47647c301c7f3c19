"""`dilated slide encode`: embeddings, tiles, heat-maps, resuming, failures."""

import os
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
from dilated_core import reference_dilated_attention
from dilated_models.checkpoints import slide_encoder_from_gigapath
from dilated_models.cli.app import run
from dilated_models.drawing.slide_png import pixels_of
from dilated_models.pathology.coordinates import place
from dilated_models.pathology.embedding import slide_input, tile_attention
from dilated_models.pathology.features import read_features
from dilated_models.slide.recipes import RECIPES
from dilated_models.slide_encoder import create_model


@pytest.fixture
def encode(weights, tmp_path, capsys):
    def call(*arguments: Any, recipe: str = "trident", code: int = 0) -> Any:
        options = ["--checkpoint", weights, "--architecture", "tiny", "--recipe", recipe]
        out = [] if "--out" in arguments else ["--out", tmp_path / "out"]
        command = ["slide", "encode", *arguments, *options, *out, "--device", "cpu"]
        assert run([str(a) for a in command]) == code
        return capsys.readouterr()

    return call


def stored(path: Path) -> tuple[np.ndarray, dict[str, Any], dict[str, np.ndarray]]:
    with h5py.File(path) as file:
        arrays = {name: file[name][()] for name in file}
        return arrays.pop("features"), dict(file["features"].attrs), arrays


@pytest.mark.parametrize("recipe", RECIPES)
def test_embeddings_are_those_of_the_programs(tmp_path, encode, weights, write_slide, recipe):
    paths = [write_slide(tmp_path / "set" / f"{n}.h5", 30 + n, seed=n) for n in range(3)]
    printed = encode(tmp_path / "set", "--order", "as-given", recipe=recipe)
    assert ("takes the class token" in printed.err) == (not RECIPES[recipe].global_pool)
    model = create_model(weights, "tiny", 12, recipe=recipe, tuned=True)
    expected = []
    for path in paths:
        slide = read_features(path)
        coords = torch.from_numpy(slide.coords)
        if recipe in ("trident", "raw2features"):
            model.tile_size = 512
        if recipe == "slide2vec":
            coords = coords // 2
        with torch.no_grad():
            expected.append(model(torch.from_numpy(slide.features), coords)[0][0].numpy())
    table = np.load(tmp_path / "out" / "embeddings.npz")
    assert table["names"].tolist() == ["0", "1", "2"]
    assert np.array_equal(table["embeddings"], np.stack(expected))
    embedding, attributes, _ = stored(tmp_path / "out" / "1.h5")
    assert np.array_equal(embedding, expected[1])
    assert attributes["recipe"] == recipe
    assert attributes["weights_sha256"] == model.weights_sha256
    assert attributes["tiles"] == 31


def test_tiles_are_read_row_by_row_and_written_in_the_order_of_the_file(
    tmp_path, encode, weights, write_slide
):
    path = write_slide(tmp_path / "a.h5")
    printed = encode(path, "--tiles", "--heatmaps", "--order-change")
    slide = read_features(path)
    encoder = slide_encoder_from_gigapath(
        weights, {"embed_dim": 16, "in_chans": 12, "depth": 3, "num_heads": 4, "global_pool": True,
                  "segment_lengths": [8, 20, 24, 32, 64], "tile_size": 512},
    )  # fmt: skip
    order = np.lexsort((slide.coords[:, 0], slide.coords[:, 1]))
    tiles = torch.from_numpy(slide.features)
    coords = torch.from_numpy(slide.coords)
    with torch.no_grad():
        sorted_layers = encoder(tiles[order][None], coords[order][None], all_layers=True)
        given_layers = encoder(tiles[None], coords[None], all_layers=True)
        states = encoder.tile_states(tiles[order][None], coords[order][None], layers=[-2])[0, 0]
    embedding, attributes, arrays = stored(tmp_path / "out" / "a.h5")
    torch.testing.assert_close(torch.from_numpy(embedding), sorted_layers[-2, 0])
    assert attributes["order"] == "row-major"
    assert np.array_equal(arrays["coords"], slide.coords)
    torch.testing.assert_close(torch.from_numpy(arrays["tile_features"])[order], states)
    change = (given_layers[-2, 0] - sorted_layers[-2, 0]).norm() / sorted_layers[-2, 0].norm()
    assert f"the other order changes the embedding by {change:.1%}" in printed.err
    assert arrays["attention"].shape == (40,)
    assert arrays["attention"].mean() == pytest.approx(1, abs=1e-5)
    assert (tmp_path / "out" / "a.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("global_pool", [False, True])
def test_attention_is_that_of_the_definition(tmp_path, tiny, write_slide, global_pool):
    torch.manual_seed(0)
    encoder = create_model(None, "tiny", 12, global_pool=global_pool)
    slide = read_features(write_slide(tmp_path / "a.h5"))
    given = slide_input(slide, place(slide, RECIPES["trident"]), "row-major", torch.device("cpu"))
    encoder.tile_size = 512
    with torch.no_grad():
        got = tile_attention(encoder, given, layer=1, rows=40)
        x = encoder.encoder.layers[0](encoder.embedded(given.tiles, given.coords))
        layer = encoder.encoder.layers[1]
        x = layer.self_attn_layer_norm(x)
        q, k, _ = layer.self_attn.project(x, x, x)
        # Attention with one-hot values gives the attention matrix.
        values = torch.eye(41)[None, :, None].expand(1, 41, 4, 41)
        rows = reference_dilated_attention(q.double(), k.double(), values.double(), tiny.pattern)[
            0
        ].mean(1)
    weights = rows[1:].mean(0) if global_pool else rows[0]
    expected = torch.empty(40)
    expected[torch.from_numpy(given.order)] = (weights[1:] / weights[1:].mean()).float()
    torch.testing.assert_close(torch.from_numpy(got), expected, rtol=1e-4, atol=1e-5)


def test_a_second_run_encodes_what_is_new_or_changed(tmp_path, encode, write_slide):
    folder, out = tmp_path / "set", tmp_path / "out"
    for n in range(3):
        write_slide(folder / f"{n}.h5", seed=n)
    encode(folder)
    before = {path.name: path.stat().st_mtime_ns for path in out.iterdir()}
    write_slide(folder / "1.h5", seed=9)
    os.utime(folder / "1.h5", ns=(1, 1))
    write_slide(folder / "3.h5", seed=3)
    (out / "2.h5").write_bytes(b"cut short")
    printed = encode(folder)
    assert "4 slides, 1 of them from before" in printed.out
    assert out.joinpath("0.h5").stat().st_mtime_ns == before["0.h5"]
    assert np.load(out / "embeddings.npz")["embeddings"].shape == (4, 16)


def test_other_settings_need_another_folder(tmp_path, encode, write_slide):
    path = write_slide(tmp_path / "a.h5")
    encode(path)
    printed = encode(path, recipe="raw2features", code=2)
    assert "holds embeddings with recipe 'trident'" in printed.err
    assert "name another folder" in printed.err
    encode(path, "--out", tmp_path / "other", recipe="raw2features")
    assert encode(path, "--order", "as-given", code=2).err.count("order") == 1


def test_a_slide_that_fails_does_not_stop_the_others(tmp_path, encode, write_slide):
    for n in range(3):
        bad = {"features": np.full((40, 12), np.nan)} if n == 1 else {}
        write_slide(tmp_path / "set" / f"{n}.h5", seed=n, **bad)
    write_slide(tmp_path / "set" / "4.h5", coords=np.full((40, 2), 512_000))
    printed = encode(tmp_path / "set", code=1)
    assert "1.h5: failed: " in printed.err
    assert "4.h5: failed: 40 of 40 tiles lie outside the grid" in printed.err
    assert "2 of 4 slides failed" in printed.err
    assert np.load(tmp_path / "out" / "embeddings.npz")["names"].tolist() == ["0", "2"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--order", "spiral"], "--order is 'spiral'"),
        (["--sha256", "0" * 64], "it must have 0000"),
        (["--dtype", "float8"], "--dtype is 'float8'"),
        (["--max-wsi-size", 10], "--max-wsi-size is 10"),
        (["--tile-size", 0], "--tile-size is 0"),
    ],
)
def test_bad_options_are_one_line_and_leave_nothing(
    tmp_path, encode, write_slide, arguments, message
):
    printed = encode(write_slide(tmp_path / "a.h5"), *arguments, code=2)
    assert message in printed.err.strip().splitlines()[-1]
    assert not (tmp_path / "out").exists()


def test_bfloat16_is_close_to_float32(tmp_path, encode, write_slide):
    path = write_slide(tmp_path / "a.h5")
    encode(path)
    encode(path, "--dtype", "bfloat16", "--out", tmp_path / "half")
    exact, half = stored(tmp_path / "out" / "a.h5")[0], stored(tmp_path / "half" / "a.h5")[0]
    assert half.dtype == np.float32
    np.testing.assert_allclose(half, exact, atol=0.1)
    assert not np.array_equal(half, exact)


def test_pixels_are_means_of_cells():
    cells = np.array([[2, 7], [4, 7], [4, 7], [3, 9]])
    pixels = pixels_of(cells, np.array([1, 2, 6, 5], np.float32))
    nan = np.nan
    np.testing.assert_array_equal(pixels, [[1, nan, 4], [nan, nan, nan], [nan, 5, nan]])
