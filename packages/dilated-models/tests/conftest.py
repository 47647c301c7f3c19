from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from dilated_models import LongNetConfig, LongNetLM


@pytest.fixture(autouse=True)
def not_by_uv(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hints name the command as it was started, and the tests may themselves run under `uv run`."""
    monkeypatch.delenv("UV_RUN_RECURSION_DEPTH", raising=False)


@pytest.fixture
def config() -> LongNetConfig:
    """Two blocks, four heads, and branches that divide neither each other nor the lengths used."""
    return LongNetConfig(
        num_tokens=61,
        d_model=32,
        nhead=4,
        num_decoder_layers=2,
        dim_feedforward=48,
        segment_lengths=(6, 16, 40),
        dilation_rates=(1, 3, 4),
    )


@pytest.fixture
def model(config: LongNetConfig) -> LongNetLM:
    torch.manual_seed(0)
    return LongNetLM(config, dtype=torch.float64)


@pytest.fixture
def tokens() -> torch.Tensor:
    return torch.randint(61, (2, 45), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="session")
def write_text() -> Callable[[Path], Path]:
    """Makes a folder of 30 small source files, some of them nested, and others to skip."""

    def write(folder: Path) -> Path:
        (folder / "nested").mkdir(parents=True)
        for i in range(30):
            name = f"nested/file{i}.py" if i % 3 == 0 else f"file{i}.py"
            body = "".join(f"def f{i}_{j}(x):\n    return x + {i * j}\n\n\n" for j in range(12 + i))
            (folder / name).write_text(body)
        (folder / "empty.py").touch()
        (folder / "image.png").write_bytes(b"\x89PNG\0\0" * 10)
        (folder / ".hidden").write_text("not text to train on")
        return folder

    return write


@pytest.fixture
def text(tmp_path: Path, write_text: Callable[[Path], Path]) -> Path:
    return write_text(tmp_path / "text")
