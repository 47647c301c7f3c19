"""`dilated slide finetune`: a slide encoder and a classifier on labelled slides."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dilated_models.cli.options import DeviceOption, DtypeOption, integers
from dilated_models.cli.slide import (
    ArchitectureOption,
    FeaturesArgument,
    OrderOption,
    Sha256Option,
    WeightsOption,
)

if TYPE_CHECKING:
    from dilated_models.pathology.finetuning import StepReport


def finetune(
    features: FeaturesArgument,
    labels: Annotated[Path, typer.Option(metavar="CSV", help="Labels, with a header.")],
    checkpoint: WeightsOption,
    out: Annotated[Path, typer.Option(metavar="DIR", help="Gets weights, probabilities, scores.")],
    slide_column: Annotated[str, typer.Option(help="Of the CSV file.")] = "slide_id",
    label_column: Annotated[str, typer.Option(help="Of the CSV file.")] = "label",
    patient_column: Annotated[
        str | None, typer.Option(help="Of the CSV file: keeps a patient's slides in one fold.")
    ] = None,
    folds: Annotated[int, typer.Option(help="Of the cross-validation.")] = 5,
    epochs: Annotated[int, typer.Option(help="Passes over the training slides.")] = 5,
    base_lr: Annotated[
        float, typer.Option(help="Peak rate at 256 slides per step; scaled to --accumulation.")
    ] = 2e-3,
    weight_decay: Annotated[float, typer.Option(help="AdamW's.")] = 0.05,
    layer_decay: Annotated[
        float, typer.Option(help="Factor from a layer to the one below.")
    ] = 0.95,
    accumulation: Annotated[int, typer.Option(help="Slides per step.")] = 32,
    layers: Annotated[
        str, typer.Option(metavar="N,N", help="Hidden states that the classifier reads.")
    ] = "11",
    dropout: Annotated[float, typer.Option(help="In the encoder.")] = 0.1,
    drop_path_rate: Annotated[float, typer.Option(help="In the encoder.")] = 0.0,
    global_pool: Annotated[
        bool, typer.Option(help="Mean over tiles instead of the class token.")
    ] = False,
    freeze: Annotated[bool, typer.Option(help="Train the classifier alone.")] = False,
    level0_tile: Annotated[
        bool, typer.Option(help="A grid cell is a tile on level 0, as TRIDENT has it; else 256.")
    ] = False,
    max_wsi_size: Annotated[
        int, typer.Option(help="Longer side of the largest slide, in pixels: gives the pattern.")
    ] = 250_000,
    order: OrderOption = "row-major",
    checkpoint_activations: Annotated[
        bool, typer.Option(help="Recompute each layer in backward: less memory.")
    ] = True,
    seed: Annotated[int, typer.Option(help="Of folds, order, dropout and first weights.")] = 0,
    architecture: ArchitectureOption = None,
    sha256: Sha256Option = None,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "auto",
) -> None:
    """Cross-validated fine-tuning with the hyper-parameters published for PANDA."""
    from dilated_models.pathology.features import feature_files
    from dilated_models.pathology.labels import read_labels

    slides = read_labels(
        labels,
        feature_files(features),
        slide_column=slide_column,
        label_column=label_column,
        patient_column=patient_column,
    )
    import torch

    from dilated_models.cli.progress import Progress, plain_console
    from dilated_models.pathology.cross_validation import cross_validate
    from dilated_models.pathology.finetuning import FineTuningConfig
    from dilated_models.pathology.loading import load_encoder
    from dilated_models.slide.encoder import LongNetSlideEncoder
    from dilated_models.training.devices import choose_device, choose_dtype

    where = choose_device(device)
    kind = choose_dtype(dtype, where)
    config = FineTuningConfig(
        epochs=epochs,
        base_lr=base_lr,
        weight_decay=weight_decay,
        layer_decay=layer_decay,
        accumulation=accumulation,
        layers=integers("--layers", layers) or [],
        freeze=freeze,
        order=order,
        level0_tile=level0_tile,
        seed=seed,
    )

    def make_encoder() -> LongNetSlideEncoder:
        return load_encoder(
            checkpoint,
            architecture,
            sha256=sha256,
            device=where,
            global_pool=global_pool,
            max_wsi_size=max_wsi_size,
            dropout=dropout,
            drop_path_rate=drop_path_rate,
            activation_checkpointing=checkpoint_activations,
        )

    encoder = make_encoder()  # before anything is written
    depth = encoder.config.depth
    for layer in config.layers:
        if not -depth - 1 <= layer <= depth:
            raise ValueError(
                f"layers holds {layer}; the encoder has the hidden states 0 to {depth}."
            )
    settings = {
        "weights_sha256": encoder.weights_sha256,
        "global_pool": global_pool,
        "dropout": dropout,
        "drop_path_rate": drop_path_rate,
        "max_wsi_size": max_wsi_size,
        "dtype": kind,
    }
    console = plain_console(stderr=True)
    trained = len(slides.labels) * (folds - 1) / max(1, folds)  # slides of an epoch, about
    total = round(folds * epochs * trained)
    began = time.monotonic()
    with Progress(console, "slide", has_finished_bar=False) as progress:

        def stepped(fold: int, report: StepReport) -> None:
            done = min(total, round((fold * epochs + report.epoch) * trained) + report.slides)
            left = (time.monotonic() - began) / done * (total - done)
            numbers = f"fold {fold} · epoch {report.epoch} · loss {report.loss:.4f}"
            progress.show(done, total, seconds_left=left, numbers=numbers)

        summary = cross_validate(
            make_encoder,
            slides,
            out,
            config,
            folds=folds,
            settings=settings,
            autocast=torch.bfloat16 if kind == "bfloat16" else None,
            on_step=stepped,
            on_fold=lambda fold, scores: console.print(
                f"fold {fold}: " + ", ".join(f"{k} {v:.4f}" for k, v in scores.items())
            ),
        )
    counts = ", ".join(
        f"{label}: {int((slides.labels == i).sum())}" for i, label in enumerate(slides.classes)
    )
    typer.echo(f"{len(slides.labels)} slides ({counts}), {folds} folds")
    for name, (mean, deviation) in summary.items():
        typer.echo(f"{name} {mean:.4f} ± {deviation:.4f}")
    typer.echo(f"wrote {out}")
