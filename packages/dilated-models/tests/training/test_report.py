"""The report: xz's bits per byte, and the plot."""

import os

import pytest
import torch
from dilated_models.training.report import plot_losses, xz_bits_per_byte


def test_xz_and_the_plot(tmp_path):
    assert xz_bits_per_byte(b"a" * 100_000) == (pytest.approx(0.0, abs=0.05), 100_000)
    noise = torch.randint(256, (50_000,), generator=torch.Generator().manual_seed(0))
    bits, num_bytes = xz_bits_per_byte(bytes(noise.tolist()))
    assert 8 <= bits < 8.1
    assert num_bytes == 50_000
    with pytest.raises(ValueError, match="text is empty; it must hold"):
        xz_bits_per_byte(b"")
    records = [{"kind": "step", "step": i, "bits_per_byte": 8 / i} for i in range(1, 5)]
    plot_losses(tmp_path, records, xz=1.0)
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")
    plot_losses(tmp_path, [])
    assert os.listdir(tmp_path) == ["loss.png"]
