"""`create_model`: the calls of GigaPath's own function, recipes, warnings, refusals."""

import inspect
import warnings

import pytest
import torch
from dilated_models.checkpoints import gigapath_state_dict, slide_encoder_from_gigapath
from dilated_models.slide.config import ARCHITECTURES, SlideEncoderConfig
from dilated_models.slide_encoder import (
    RECIPES,
    LongNetViT,
    UntrainedClassTokenWarning,
    create_model,
)

TINY = SlideEncoderConfig(
    in_chans=12,
    embed_dim=16,
    depth=3,
    num_heads=4,
    segment_lengths=[8, 20, 64],
    dilation_rates=[1, 2, 4],
)


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    monkeypatch.setitem(ARCHITECTURES, "tiny", TINY)


@pytest.fixture
def slide():
    generator = torch.Generator().manual_seed(1)
    tiles = torch.randn(1, 40, 12, generator=generator)
    return tiles, torch.randint(30, (1, 40, 2), generator=generator) * 256


@pytest.fixture
def file(tmp_path):
    torch.manual_seed(0)
    path = tmp_path / "slide_encoder.pth"
    torch.save({"model": gigapath_state_dict(create_model("", "tiny", 12))}, path)
    return path


def test_the_arguments_are_those_of_the_published_function():
    names = list(inspect.signature(create_model).parameters)
    assert names[:4] == ["pretrained", "model_arch", "in_chans", "local_dir"]
    assert isinstance(create_model(None, "tiny", 12), LongNetViT)


@pytest.mark.parametrize("global_pool", [False, True])
def test_calls_return_lists_and_take_one_slide_without_a_batch(file, slide, global_pool):
    model = create_model(str(file), "tiny", 12, global_pool=global_pool, tuned=True)
    config = {**{k: getattr(TINY, k) for k in TINY.__dataclass_fields__}, "max_wsi_size": None}
    encoder = slide_encoder_from_gigapath(file, config | {"global_pool": global_pool})
    tiles, coords = slide
    with torch.no_grad():
        embedding, layers = encoder(tiles, coords), encoder(tiles, coords, all_layers=True)
        for x, where in ((tiles, coords), (tiles[0], coords[0])):
            assert torch.equal(model(x, where)[0], embedding)
            got = model(x, where, all_layer_embed=True)
            assert isinstance(got, list)
            assert torch.equal(torch.stack(got), layers)
    assert model.weights_sha256 == encoder.weights_sha256 != None  # noqa: E711


# What each program takes from the published model.
EXPECTED = {
    "official": (False, lambda layers, plain: layers[-1]),
    "trident": (True, lambda layers, plain: layers[2]),  # 11 of 12 layers; here 2 of 3
    "slide2vec": (False, lambda layers, plain: plain),
    "lazyslide": (False, lambda layers, plain: plain),
    "raw2features": (True, lambda layers, plain: layers[-1]),
}


@pytest.mark.parametrize("recipe", EXPECTED)
def test_a_recipe_returns_what_its_program_takes(file, slide, recipe):
    global_pool, take = EXPECTED[recipe]
    model = create_model(file, "tiny", 12, recipe=recipe, tuned=True)
    plain = create_model(file, "tiny", 12, global_pool=global_pool, tuned=True)
    with torch.no_grad():
        (got,) = model(*slide)
        expected = take(plain(*slide, all_layer_embed=True), plain(*slide)[0])
        assert torch.equal(got, expected)
        assert len(model(*slide, all_layer_embed=True)) == 4
    assert RECIPES.keys() == EXPECTED.keys()


def test_trident_sets_the_tile_size_of_each_slide(file, slide):
    model = create_model(file, "tiny", 12, global_pool=True)
    tiles, coords = slide
    with torch.no_grad():
        expected = model(tiles, coords, all_layer_embed=True)[2]
        model.tile_size = 1024
        assert torch.equal(model(tiles, coords * 4, all_layer_embed=True)[2], expected)


def test_the_class_token_of_untuned_weights_warns_once(file, slide):
    model = create_model(file, "tiny", 12)
    with pytest.warns(UntrainedClassTokenWarning, match="did not train") as caught:
        model(*slide)
    assert caught[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(*slide)
        create_model(file, "tiny", 12, global_pool=True)(*slide)
        create_model(file, "tiny", 12, tuned=True)(*slide)
        create_model("", "tiny", 12)(*slide)
        tuned = create_model(file, "tiny", 12).train()
        tuned(*slide)[0].square().sum().backward()
        torch.optim.AdamW(tuned.parameters()).step()
        tuned.eval()(*slide)


def test_weights_under_either_names_are_loaded(file, slide):
    published = torch.load(file, weights_only=True)["model"]
    model, expected = create_model("", "tiny", 12), create_model(file, "tiny", 12, tuned=True)
    with torch.no_grad():
        for weights in (published, expected.state_dict()):
            model.reset_parameters()
            model.load_state_dict(weights)
            assert torch.equal(model(*slide)[0], expected(*slide)[0])


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"recipe": "trident", "global_pool": False}, ValueError, "give one of the two"),
        ({"recipe": "mean"}, ValueError, "must be one of 'official', 'trident'"),
        ({"mlp_ratio": 2}, TypeError, "give ffn_dim"),
        ({"task": "panda"}, TypeError, "no argument 'task'"),
        ({"sha256": "0" * 64}, ValueError, "it must have 0000"),
        ({"in_chans": 13}, ValueError, r"patch_embed.proj.weight has shape \(16, 12\)"),
        ({"model_arch": "tiny2"}, ValueError, "must be one of"),
        ({"pretrained": "absent.pth"}, FileNotFoundError, "No weights are drawn at random"),
        ({"pretrained": "", "sha256": "0" * 64}, ValueError, "without a file"),
        ({"global_pool": 1}, TypeError, "True or False"),
    ],
)
def test_bad_arguments_are_refused(file, change, error, message):
    arguments = {"pretrained": file, "model_arch": "tiny", "in_chans": 12} | change
    with pytest.raises(error, match=message):
        create_model(**arguments)


def test_the_pattern_follows_the_size_of_slides():
    model = create_model(None, "gigapath_slide_enc12l384d", 384, depth=1, max_wsi_size=250_000)
    assert model.config.pattern.segment_lengths == (1024, 4870, 23170, 110217, 524288)


def test_downloads_of_two_repositories_do_not_meet(file, monkeypatch, tmp_path):
    hub = pytest.importorskip("huggingface_hub")
    asked = []

    def download(name, *, filename, revision, local_dir):
        asked.append((name, filename, revision, local_dir))
        return str(file)

    monkeypatch.setattr(hub, "hf_hub_download", download)
    create_model("hf_hub:a/b@12ab", "tiny", 12, tmp_path)
    create_model("hf_hub:a/c", "tiny", 12)
    assert asked == [
        ("a/b", "slide_encoder.pth", "12ab", tmp_path / "a--b"),
        ("a/c", "slide_encoder.pth", None, None),
    ]
