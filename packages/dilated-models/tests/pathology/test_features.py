"""Feature files: kinds, attributes, refusals; orders and reports of coordinates."""

import h5py
import numpy as np
import pytest
from dilated_models.pathology.coordinates import place, report_coordinates
from dilated_models.pathology.features import feature_files, read_features
from dilated_models.pathology.orders import tile_order
from dilated_models.slide.recipes import RECIPES


def test_h5_and_npz_hold_the_same_slide(tmp_path, write_slide):
    slide = read_features(write_slide(tmp_path / "a.h5"))
    assert (slide.name, slide.features.dtype, slide.coords.dtype) == ("a", "float32", "int64")
    assert (slide.level0_tile, slide.scale) == (512, 0.5)
    np.savez(
        tmp_path / "b.npz",
        features=slide.features[None].astype(np.float16),
        coords=slide.coords[None] + 0.25,  # TRIDENT rounds
        patch_size_level0=512,
    )
    other = read_features(tmp_path / "b.npz")
    assert np.array_equal(other.coords, slide.coords)
    assert np.allclose(other.features, slide.features, atol=2e-3)
    assert other.level0_tile == 512
    assert other.scale is None


def test_attributes_of_clam(tmp_path, write_slide):
    clam = {"patch_size_level0": None, "downsample": [4.0, 4.0], "patch_level": 1}
    slide = read_features(write_slide(tmp_path / "a.h5", **clam))
    assert slide.level0_tile == 1024


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"features": None}, "lacks features"),
        ({"coords": None}, "lacks coords"),
        ({"coords": np.zeros((39, 2))}, r"must be \(L, C\) and \(L, 2\)"),
        ({"features": np.zeros((0, 12)), "coords": np.zeros((0, 2))}, "has no tile"),
        ({"features": np.full((40, 12), np.nan)}, "40 of 40 tiles whose features are not finite"),
        ({"coords": np.full((40, 2), np.inf)}, "coords are not finite"),
        ({"features": np.zeros((40, 12), int)}, "of dtype int64"),
    ],
)
def test_files_that_do_not_fit_are_refused(tmp_path, write_slide, change, message):
    with pytest.raises(ValueError, match=message):
        read_features(write_slide(tmp_path / "a.h5", **change))


def test_what_is_no_feature_file_is_refused(tmp_path):
    for name in ("text.h5", "text.npz"):
        (tmp_path / name).write_text("no features")
        with pytest.raises(ValueError, match="can be read"):
            read_features(tmp_path / name)
    with pytest.raises(FileNotFoundError):
        read_features(tmp_path / "absent.h5")


def test_files_are_found_in_folders_and_names_tell_slides_apart(tmp_path, write_slide):
    paths = [write_slide(tmp_path / "set" / name) for name in ("b.h5", "a.h5", "deep/c.h5")]
    assert feature_files([tmp_path / "set"]) == [paths[1], paths[0], paths[2]]
    assert feature_files([paths[0], paths[0]]) == [paths[0]]
    write_slide(tmp_path / "other" / "a.h5")
    with pytest.raises(ValueError, match="have one name"):
        feature_files([tmp_path])
    (tmp_path / "a.pt").touch()
    with pytest.raises(ValueError, match=r"give the \.h5 file beside it"):
        feature_files([tmp_path / "a.pt"])
    (tmp_path / "empty").mkdir()
    for absent in ("empty", "absent.h5"):
        with pytest.raises(FileNotFoundError):
            feature_files([tmp_path / absent])


def test_row_major_is_row_by_row_and_stable():
    rng = np.random.default_rng(0)
    coords = rng.integers(5, size=(60, 2)) * 256
    order = tile_order(coords, "row-major")
    keys = [(y, x, i) for i, (x, y) in enumerate(coords.tolist())]
    assert order.tolist() == [i for _, _, i in sorted(keys)]
    assert tile_order(coords, "as-given").tolist() == list(range(60))
    with pytest.raises(ValueError, match="'row-major', 'as-given'"):
        tile_order(coords, "hilbert")


def test_coordinates_of_each_recipe(tmp_path, write_slide):
    slide = read_features(write_slide(tmp_path / "a.h5"))
    for name, (factor, tile_size) in {
        "official": (1, 256),
        "lazyslide": (1, 256),
        "trident": (1, 512),
        "raw2features": (1, 512),
        "slide2vec": (0.5, 256),
    }.items():
        placement = place(slide, RECIPES[name])
        assert np.array_equal(placement.coords, slide.coords * factor)
        assert placement.tile_size == tile_size
        assert place(slide, RECIPES[name], tile_size=1000).tile_size == 1000
    bare = {"patch_size": None, "patch_size_level0": None, "target_magnification": None}
    slide = read_features(write_slide(tmp_path / "b.h5", **bare))
    for name in ("trident", "slide2vec"):
        with pytest.raises(ValueError, match="does not tell"):
            place(slide, RECIPES[name])
    assert place(slide, RECIPES["trident"], tile_size=512).tile_size == 512


def test_the_report_finds_another_level_and_shared_cells(tmp_path, write_slide):
    slide = read_features(write_slide(tmp_path / "a.h5", 400))

    def report(name, **options):
        placement = place(slide, RECIPES[name], **options)
        return report_coordinates(slide, placement, slide_ngrids=1000)

    good = report("trident")
    assert (good.tiles, good.stride, good.columns, good.rows) == (400, 512, 20, 20)
    assert (good.shared, good.outside) == (0, 0)
    assert good.lines() == [
        "400 tiles in 20 × 20 cells of 512 pixels, a stride of 512 pixels, tiles at 20×, level 0 "
        "at 40×"
    ]
    sparse = report("official").lines()
    assert "tiles are 512 pixels apart and cells 256 wide" in sparse[1]
    shared = report("official", tile_size=1024)
    assert (shared.shared, shared.fullest) == (1, 4)
    assert "100% of the tiles share a cell with another one, up to 4 in one" in shared.lines()[1]
    assert report("official", tile_size=5).outside > 0


def test_a_slide_of_one_tile_has_a_report(tmp_path, write_slide):
    slide = read_features(write_slide(tmp_path / "a.h5", 1))
    report = report_coordinates(slide, place(slide, RECIPES["trident"]), slide_ngrids=1000)
    assert report.stride is None
    assert "one tile" in report.lines()[0]


def test_a_missing_h5py_is_named(tmp_path, write_slide, monkeypatch, capsys):
    import sys

    from dilated_models.cli.app import run

    path = write_slide(tmp_path / "a.h5")
    monkeypatch.setitem(sys.modules, "h5py", None)
    with pytest.raises(ModuleNotFoundError):
        read_features(path)
    (tmp_path / "w.pth").touch()
    assert h5py is not None
    code = run(["slide", "encode", str(path), "--recipe", "trident", "--checkpoint", "w.pth"])
    assert code == 2
    assert "there is no file 'w.pth'" in capsys.readouterr().err
