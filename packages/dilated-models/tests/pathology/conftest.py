from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from dilated_models.checkpoints import gigapath_state_dict
from dilated_models.slide.config import ARCHITECTURES, SlideEncoderConfig
from dilated_models.slide.encoder import LongNetSlideEncoder

TINY = SlideEncoderConfig(
    in_chans=12,
    embed_dim=16,
    depth=3,
    num_heads=4,
    segment_lengths=[8, 20, 24, 32, 64],
    dropout=0.0,
    drop_path_rate=0.0,
)


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    monkeypatch.setitem(ARCHITECTURES, "tiny", TINY)
    return TINY


@pytest.fixture
def weights(tmp_path) -> Path:
    torch.manual_seed(0)
    path = tmp_path / "slide_encoder.pth"
    torch.save({"model": gigapath_state_dict(LongNetSlideEncoder(TINY))}, path)
    return path


@pytest.fixture
def write_slide():
    """Writes a feature file as TRIDENT does: tiles of 256 pixels at 20×, level 0 at 40×."""

    def write(path: Path, count: int = 40, *, seed: int = 0, shift: float = 0.0, **change) -> Path:
        rng = np.random.default_rng(seed)
        cells = rng.choice(20 * 20, count, replace=False)
        coords = np.stack((cells % 20, cells // 20), 1) * 512
        arrays = {
            "features": (rng.standard_normal((count, 12)) + shift).astype(np.float32),
            "coords": coords,
        } | {name: value for name, value in change.items() if name in ("features", "coords")}
        attributes = {
            "patch_size": 256,
            "patch_size_level0": 512,
            "level0_magnification": 40,
            "target_magnification": 20,
        }
        attributes |= {k: v for k, v in change.items() if k not in arrays}
        path.parent.mkdir(parents=True, exist_ok=True)
        with h5py.File(path, "w") as file:
            for name, array in arrays.items():
                if array is not None:
                    file.create_dataset(name, data=array)
            if "coords" in file:
                file["coords"].attrs.update({k: v for k, v in attributes.items() if v is not None})
        return path

    return write
