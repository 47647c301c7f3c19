"""The report: xz's bits per byte, the plot and the tables."""

import json
import os
from typing import Any

import pytest
import torch
from dilated_models import LongNetConfig
from dilated_models.training import gain as gain_module
from dilated_models.training.config import PRESETS, TrainingConfig
from dilated_models.training.contextwise import BorderLoss, ContextLoss, Contextwise
from dilated_models.training.gain import Gain, recorded_plain_training
from dilated_models.training.report import (
    gain_lines,
    means_between,
    plot_losses,
    xz_bits_per_byte,
)
from matplotlib.figure import Figure


def losses(*values: float) -> tuple[ContextLoss, ...]:
    return tuple(
        ContextLoss(context=16 << i, bits_per_byte=value) for i, value in enumerate(values)
    )


@pytest.fixture
def gain() -> Gain:
    border = BorderLoss(nearest=0, farthest=0, bits_per_byte=3.5, copied_bits_per_byte=4.5)
    rest = BorderLoss(nearest=1, farthest=15, bits_per_byte=2.5, copied_bits_per_byte=1.5)
    measured = Contextwise(
        num_targets=640,
        num_bytes=700,
        by_context=losses(2.9, 2.7, 2.1, 1.9),
        by_border=(border, rest),
    )
    return Gain(contextwise=measured, predictor=losses(3.1, 3.0, 2.8, 2.6), plain=losses(2.8, 2.2))


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


def test_the_plot_has_titles_legends_and_a_line_for_each_column(tmp_path, gain, monkeypatch):
    drawn: list[Figure] = []
    real = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda f, *a, **k: drawn.append(f) or real(f, *a, **k))
    records = [{"kind": "step", "step": i, "bits_per_byte": 8 / i} for i in range(1, 9)]
    records += [{"kind": "validation", "step": i, "bits_per_byte": 8 - i} for i in (0, 4, 8)]
    plot_losses(tmp_path, records, copied_steps=3, xz=1.0, gain=gain)
    (figure,) = drawn
    assert figure.get_suptitle() == f"{tmp_path.name}: bits per byte"
    steps, contexts = figure.axes
    labels = [text.get_text() for text in steps.get_legend().get_texts()]
    assert labels == [
        "trains on copies",
        "training, mean since the last validation",
        "validation",
        "xz -9 (validation text)",
    ]
    assert (steps.get_title(), contexts.get_title()) == (
        "Loss over training",
        "Loss of the same 640 targets",
    )
    lines = {line.get_label(): line for line in contexts.get_lines()}
    assert list(lines["this model"].get_ydata()) == [2.9, 2.7, 2.1, 1.9]
    assert list(lines["trained on plain text only"].get_xdata()) == [16, 32]
    assert list(lines["counting predictor"].get_ydata()) == [3.1, 3.0, 2.8, 2.6]
    assert set(lines["this model, a local window of 64"].get_ydata()) == {2.1}


def test_training_is_averaged_over_the_steps_between_validations():
    steps = [(i, float(i)) for i in range(1, 8)]
    assert means_between(steps, [0, 3, 7]) == [(3, 2.0), (7, 5.5)]
    assert means_between(steps, []) == means_between([], [0, 3]) == []


def test_the_tables(gain):
    rows = [line.split() for line in gain_lines(gain)]
    assert ["16", "2.900", "2.800", "3.100"] in rows
    assert ["64", "2.100", "2.800"] in rows  # nothing is recorded for 64
    assert ["0", "3.500", "4.500"] in rows
    assert ["1-15", "2.500", "1.500"] in rows
    assert "(the row of 64 is this model with a local window of 64)" in gain_lines(gain)
    assert any("same 640 targets" in line for line in gain_lines(gain))
    assert any("distance from the last border" in line for line in gain_lines(gain))
    assert gain_lines(None) == ["no document is long enough to tell what context gains"]


def test_a_record_is_shown_for_the_same_model_and_as_many_tokens(tmp_path, monkeypatch):
    preset = PRESETS["tiny"]
    model = LongNetConfig.from_dict(preset.model | {"num_tokens": 256})
    numbers: dict[str, Any] = preset.training | {"warmup_copies": 0.3}
    record = {
        "model": model.to_dict(),
        "training": {name: numbers[name] for name in ("steps", "batch_size", "seq_len")},
        "by_context": [{"context": 16, "bits_per_byte": 2.5}],
    }
    (tmp_path / "record.json").write_text(json.dumps([record]))
    monkeypatch.setattr(gain_module, "_RECORDED", tmp_path / "record.json")

    def shown(model: LongNetConfig, **changes: Any) -> tuple[ContextLoss, ...]:
        return recorded_plain_training(model, TrainingConfig(**numbers | changes))

    assert shown(model) == shown(model, seed=5) == losses(2.5)
    assert shown(model, steps=7) == shown(model, warmup_copies=0.0) == ()
    assert shown(LongNetConfig.from_dict(model.to_dict() | {"d_model": 64})) == ()


def test_the_committed_record_can_be_read():
    for record in json.loads(gain_module._RECORDED.read_text()):
        model = LongNetConfig.from_dict(record["model"])
        changes = {"warmup_copies": 0.3} | record["training"]
        training = TrainingConfig(**PRESETS["tiny"].training | changes)
        assert len(recorded_plain_training(model, training)) == len(record["by_context"])
