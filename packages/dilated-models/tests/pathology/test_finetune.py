"""Fine-tuning: labels, folds, rates, steps, scores, and the command."""

import csv
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from dilated_models.checkpoints import read_checkpoint, slide_encoder_from_gigapath
from dilated_models.cli.app import run
from dilated_models.pathology.classifier import (
    SlideClassifier,
    learning_rate,
    parameter_groups,
)
from dilated_models.pathology.features import read_features
from dilated_models.pathology.finetuning import FineTuningConfig, fine_tune
from dilated_models.pathology.labels import LabelledSlides, assign_folds, read_labels
from dilated_models.pathology.scores import classification_scores
from dilated_models.slide.encoder import LongNetSlideEncoder
from torch.nn.functional import cross_entropy


def write_csv(path: Path, rows, header=("slide_id", "label")) -> Path:
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([header, *rows])
    return path


@pytest.fixture
def slides(tmp_path, write_slide) -> LabelledSlides:
    """Twelve slides whose features tell their class."""
    sources = [
        write_slide(tmp_path / "set" / f"s{n:02}.h5", 10 + n, seed=n, shift=2.0 * (n % 2))
        for n in range(12)
    ]
    rows = [(f"s{n:02}.svs", "tumour" if n % 2 else "normal") for n in range(12)]
    return read_labels(write_csv(tmp_path / "labels.csv", rows), sources)


def test_labels_are_sorted_and_belong_to_files(tmp_path, slides):
    assert list(slides.classes) == ["normal", "tumour"]
    assert slides.labels.tolist() == [0, 1] * 6
    rows = [("s00", "10"), ("s01", "9"), ("s02", "9"), ("s03", "")]
    numbers = read_labels(write_csv(tmp_path / "n.csv", rows), slides.sources)
    assert list(numbers.classes) == ["9", "10"]
    assert numbers.labels.tolist() == [1, 0, 0]


@pytest.mark.parametrize(
    ("rows", "header", "message"),
    [
        ([("s00", "a"), ("absent", "b")], ("slide_id", "label"), "1 of 2 .* the first 'absent'"),
        ([("s00", "a"), ("s00", "b")], ("slide_id", "label"), "two rows for 's00'"),
        ([("s00", "a"), ("s01", "a")], ("slide_id", "label"), "have 1 classes"),
        ([("s00", "a")], ("slide", "label"), "must have 'slide_id'"),
    ],
)
def test_bad_labels_are_refused(tmp_path, slides, rows, header, message):
    with pytest.raises(ValueError, match=message):
        read_labels(write_csv(tmp_path / "bad.csv", rows, header), slides.sources)


@pytest.mark.parametrize("folds", [2, 3, 5])
def test_folds_keep_patients_whole_and_spread_classes(folds):
    rng = np.random.default_rng(folds)
    patients = [f"p{n}" for n in rng.integers(40, size=100)]
    own = {p: n % 4 for n, p in enumerate(sorted(set(patients)))}
    labels = np.array([own[p] for p in patients])
    slides = LabelledSlides([Path(str(n)) for n in range(100)], labels, patients, list("abcd"))
    assigned = assign_folds(slides, folds, seed=1)
    assert set(assigned.tolist()) == set(range(folds))
    for patient in set(patients):
        assert len({f for f, p in zip(assigned, patients, strict=True) if p == patient}) == 1
    for label in range(4):
        of_label = {p for p in own if own[p] == label}
        counts = [
            len({p for f, p in zip(assigned, patients, strict=True) if f == fold and p in of_label})
            for fold in range(folds)
        ]
        assert max(counts) - min(counts) <= 1
    assert not np.array_equal(assigned, assign_folds(slides, folds, seed=2))
    assert np.array_equal(assigned, assign_folds(slides, folds, seed=1))
    with pytest.raises(ValueError, match="as many patients as folds"):
        assign_folds(slides, 41, seed=1)


def test_rates_of_layers_are_those_of_the_published_code(tiny):
    model = SlideClassifier(LongNetSlideEncoder(tiny), 3, layers=[2, 3])
    groups = parameter_groups(model, weight_decay=0.05, layer_decay=0.5)
    found = {}
    names = {id(p): name for name, p in model.named_parameters()}
    for group in groups:
        for parameter in group["params"]:
            found[names[id(parameter)]] = (group["lr_scale"], group["weight_decay"])
    assert found.keys() == dict(model.named_parameters()).keys()
    # finetune/utils.py: num_layers = depth + 1, scale = decay ** (num_layers − layer_id)
    assert found["slide_encoder.cls_token"] == (0.5**4, 0.05)
    assert found["slide_encoder.encoder.layers.0.ffn.fc1.weight"] == (0.5**3, 0.05)
    assert found["slide_encoder.encoder.layers.2.ffn.fc1.bias"] == (0.5, 0.0)
    assert found["slide_encoder.patch_embed.proj.weight"] == (1.0, 0.05)
    assert found["slide_encoder.norm.weight"] == (1.0, 0.0)
    assert found["classifier.weight"] == (1.0, 0.05)


def test_the_rate_is_that_of_the_published_code():
    def published(epoch, lr=2e-3 * 32 / 256, min_lr=1e-6, warmup=1, epochs=5):
        if epoch < warmup:
            return lr * epoch / warmup
        half = 0.5 * (1.0 + math.cos(math.pi * (epoch - warmup) / (epochs - warmup)))
        return min_lr + (lr - min_lr) * half

    config = FineTuningConfig()
    for epoch in (0, 0.3, 1, 2.2, 4.9, 5):
        got = learning_rate(epoch, peak=config.peak_lr, floor=1e-6, warmup=1, epochs=5)
        assert got == pytest.approx(published(epoch))


def test_a_step_is_the_mean_over_its_slides(tiny, slides, monkeypatch):
    """Five slides with an accumulation of 3: steps of 3 and 2 slides."""
    torch.manual_seed(0)
    model = SlideClassifier(LongNetSlideEncoder(tiny), 2, layers=[2])
    config = FineTuningConfig(epochs=1, accumulation=3, warmup_epochs=0, layers=[2])
    order = np.random.default_rng(0).permutation(np.arange(5)).tolist()
    seen = []

    def step(self, *_):
        # The encoder's final LayerNorm lies behind the state that is read.
        seen.append(
            [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in model.parameters()]
        )

    monkeypatch.setattr(torch.optim.AdamW, "step", step)
    reports = []
    fine_tune(model, slides, range(5), config, on_step=reports.append)
    for part, got, report in zip((order[:3], order[3:]), seen, reports, strict=True):
        losses = []
        for i in part:
            slide = read_features(slides.sources[i])
            rows = np.lexsort((slide.coords[:, 0], slide.coords[:, 1]))
            tiles = torch.from_numpy(slide.features[rows])[None]
            coords = torch.from_numpy(slide.coords[rows])[None]
            losses.append(cross_entropy(model(tiles, coords), torch.tensor([i % 2])))
        loss = torch.stack(losses).mean()
        assert report.loss == pytest.approx(float(loss.detach()), rel=1e-5)
        expected = torch.autograd.grad(
            loss, list(model.parameters()), allow_unused=True, materialize_grads=True
        )
        torch.testing.assert_close(got, list(expected), rtol=1e-4, atol=1e-6)
    assert [r.slides for r in reports] == [3, 5]


@pytest.mark.parametrize("C", [2, 5])
def test_scores_by_brute_force(C):
    rng = np.random.default_rng(C)
    probabilities = rng.integers(1, 6, size=(60, C)).astype(float)  # ties
    probabilities /= probabilities.sum(1, keepdims=True)
    labels = rng.integers(C, size=60)
    scores = classification_scores(probabilities, labels)
    areas = []
    for c in range(C):
        high, low = probabilities[labels == c, c], probabilities[labels != c, c]
        wins = (high[:, None] > low).mean() + 0.5 * (high[:, None] == low).mean()
        areas.append(wins)
    assert scores["macro_auroc"] == pytest.approx(np.mean(areas))
    guessed = probabilities.argmax(1)
    recalls = [(guessed[labels == c] == c).mean() for c in range(C)]
    assert scores["balanced_accuracy"] == pytest.approx(np.mean(recalls))
    observed = ((guessed - labels) ** 2).mean()
    chance = ((guessed[:, None] - labels) ** 2).mean()
    assert scores["quadratic_kappa"] == pytest.approx(1 - observed / chance)
    one = classification_scores(np.array([[0.9, 0.1]]), np.array([0]))
    assert (one["accuracy"], math.isnan(one["macro_auroc"])) == (1.0, True)


def finetune(capsys, tmp_path, weights, *extra, code=0):
    options = ["--labels", tmp_path / "labels.csv", "--checkpoint", weights, "--out"]
    options += [tmp_path / "tuned", "--architecture", "tiny", "--layers", "2", "--device", "cpu"]
    options += ["--folds", 2, "--epochs", 3, "--accumulation", 2, "--base-lr", 0.5]
    command = ["slide", "finetune", tmp_path / "set", *options, "--global-pool", *extra]
    assert run([str(word) for word in command]) == code
    return capsys.readouterr()


def test_the_command_learns_resumes_and_writes_published_names(tmp_path, capsys, weights, slides):
    printed = finetune(capsys, tmp_path, weights)
    out = tmp_path / "tuned"
    scores = json.loads((out / "scores.json").read_text())
    assert scores["mean"]["macro_auroc"] > 0.95
    assert "12 slides (normal: 6, tumour: 6), 2 folds" in printed.out
    rows = [
        row
        for n in range(2)
        for row in csv.DictReader((out / f"fold_{n}.csv").read_text().splitlines())
    ]
    assert sorted(row["slide_id"] for row in rows) == [f"s{n:02}" for n in range(12)]
    assert all(float(r["p_normal"]) + float(r["p_tumour"]) == pytest.approx(1) for r in rows)
    tuned = read_checkpoint(out / "fold_0.safetensors")
    assert json.loads(tuned.metadata["classes"]) == ["normal", "tumour"]
    own = {n: w for n, w in tuned.weights.items() if not n.startswith("classifier.")}
    encoder = slide_encoder_from_gigapath(own, "tiny")
    before = slide_encoder_from_gigapath(weights, "tiny")
    assert not torch.equal(encoder.patch_embed.proj.weight, before.patch_embed.proj.weight)
    # One fold is lost, the other is not trained again, and the lost one comes out the same.
    lost, kept = (out / f"fold_{n}.csv" for n in (1, 0))
    content, time = lost.read_bytes(), kept.stat().st_mtime_ns
    lost.unlink()
    finetune(capsys, tmp_path, weights)
    assert lost.read_bytes() == content
    assert kept.stat().st_mtime_ns == time
    refused = finetune(capsys, tmp_path, weights, "--seed", 1, code=2)
    assert "holds folds with other seed; a folder must hold one" in refused.err


def test_a_frozen_encoder_keeps_its_weights(tmp_path, capsys, weights, slides):
    finetune(capsys, tmp_path, weights, "--freeze", "--epochs", 1, "--no-checkpoint-activations")
    tuned = read_checkpoint(tmp_path / "tuned" / "fold_0.safetensors").weights
    for name, weight in read_checkpoint(weights).weights.items():
        assert torch.equal(tuned[name], weight)


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--folds", 13], "folds is 13 and there are 12 patients"),
        (["--layers", "4"], "the encoder has the hidden states 0 to 3"),
        (["--layers", "x"], "must be integers"),
        (["--epochs", 0], "--epochs is 0"),
        (["--layer-decay", 1.5], "at most 1"),
        (["--patient-column", "case"], "must have 'case'"),
        (["--dropout", 1.0], "below 1"),
    ],
)
def test_bad_options_are_one_line_and_leave_nothing(
    tmp_path, capsys, weights, slides, extra, message
):
    printed = finetune(capsys, tmp_path, weights, *extra, code=2)
    assert message in printed.err.strip().splitlines()[-1]
    assert not (tmp_path / "tuned").exists()
