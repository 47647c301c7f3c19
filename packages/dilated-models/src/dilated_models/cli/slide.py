"""`dilated slide encode`: feature files in, slide embeddings out."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dilated_models.cli.options import DeviceOption, DtypeOption

if TYPE_CHECKING:
    from rich.console import Console

    from dilated_models.pathology.encoding import EncodedSlide

slide = typer.Typer(
    name="slide",
    help="Embed whole slides from their tile features, or fine-tune on their labels.",
    no_args_is_help=True,
)

FeaturesArgument = Annotated[
    list[Path],
    typer.Argument(metavar="PATH ...", help="Feature files (.h5, .npz), or folders of them."),
]
WeightsOption = Annotated[
    Path,
    typer.Option("--checkpoint", metavar="FILE", help="slide_encoder.pth, or safetensors."),
]
ArchitectureOption = Annotated[
    str | None,
    typer.Option(help="Such as gigapath_slide_enc12l384d; found from the weights if left out."),
]
Sha256Option = Annotated[
    str | None, typer.Option("--sha256", help="The SHA-256 that the checkpoint must have.")
]
MaxWsiSizeOption = Annotated[
    int | None,
    typer.Option(
        help="Longer side of the largest slide, in pixels: gives the pattern. 262144 if left out; "
        "the published fine-tuning has 250000."
    ),
]
TileSizeOption = Annotated[
    int | None,
    typer.Option(help="Side of a grid cell in pixels of the coordinates; else by the recipe."),
]
OrderOption = Annotated[
    str, typer.Option(help="row-major (as in the pretraining), or as-given (by the file).")
]


@slide.command()
def encode(
    features: FeaturesArgument,
    checkpoint: WeightsOption,
    recipe: Annotated[
        str, typer.Option(help="official, trident, slide2vec, lazyslide or raw2features.")
    ],
    out: Annotated[Path, typer.Option(metavar="DIR", help="Gets a file for each slide.")] = Path(
        "embeddings"
    ),
    order: OrderOption = "row-major",
    tile_size: TileSizeOption = None,
    architecture: ArchitectureOption = None,
    max_wsi_size: MaxWsiSizeOption = None,
    sha256: Sha256Option = None,
    heatmaps: Annotated[bool, typer.Option(help="Draw where attention goes, as PNG.")] = False,
    tiles: Annotated[bool, typer.Option(help="Also write contextual tile embeddings.")] = False,
    order_change: Annotated[
        bool, typer.Option(help="Report what the other order of tiles changes.")
    ] = False,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "auto",
) -> None:
    """One embedding per slide. Run it again to continue: what is there is skipped."""
    from dilated_core.checks import check_choice, check_integer

    from dilated_models.pathology.features import feature_files
    from dilated_models.pathology.orders import ORDERS
    from dilated_models.slide.recipes import recipe_called

    chosen = recipe_called(recipe)
    check_choice("order", order, ORDERS)
    if tile_size is not None:
        check_integer("tile_size", tile_size, at_least=1)
    sources = feature_files(features)
    import torch

    from dilated_models.cli.errors import fail
    from dilated_models.cli.progress import Progress, plain_console
    from dilated_models.pathology.encoding import EncodingOptions, encode_slides
    from dilated_models.pathology.loading import load_encoder
    from dilated_models.pathology.store import EmbeddingStore
    from dilated_models.training.devices import choose_device, choose_dtype

    where = choose_device(device)
    kind = choose_dtype(dtype, where)
    encoder = load_encoder(
        checkpoint,
        architecture,
        sha256=sha256,
        device=where,
        global_pool=chosen.global_pool,
        max_wsi_size=max_wsi_size,
    )
    console = plain_console(stderr=True)
    console.print(f"{checkpoint}: SHA-256 {encoder.weights_sha256}")
    if not chosen.global_pool:
        console.print(
            f"note: recipe {recipe} takes the class token, which GigaPath's pretraining did not "
            f"train; recipes trident and raw2features take the mean over tiles"
        )
    settings = {
        "recipe": recipe,
        "order": order,
        "tile_size": tile_size,
        "segment_lengths": list(encoder.config.pattern.segment_lengths),
        "dtype": kind,
        "weights_sha256": encoder.weights_sha256,
        "tile_features": tiles,
        "attention": heatmaps,
    }
    options = EncodingOptions(
        recipe=chosen,
        order=order,
        tile_size=tile_size,
        autocast=torch.bfloat16 if kind == "bfloat16" else None,
        with_tiles=tiles,
        with_attention=heatmaps,
        with_order_change=order_change,
    )
    store = EmbeddingStore(out, settings)
    results: list[EncodedSlide] = []
    began = time.monotonic()
    with Progress(console, "slide", has_finished_bar=False, total=len(sources)) as progress:
        for result in encode_slides(
            encoder, sources, store, options, before=lambda source: progress.busy(source.name)
        ):
            results.append(result)
            _print_result(console, result, out, heatmaps=heatmaps)
            worked = sum(r.status == "encoded" for r in results)
            left = (time.monotonic() - began) / max(1, worked) * (len(sources) - len(results))
            progress.show(len(results), len(sources), seconds_left=left)
    there = [r.source.stem for r in results if r.status != "failed"]
    if there:
        table = store.write_table(there)
        skipped = sum(r.status == "skipped" for r in results)
        note = f", {skipped} of them from before" if skipped else ""
        typer.echo(f"wrote {table}: {len(there)} slides{note}")
    failed = [r for r in results if r.status == "failed"]
    if failed:
        raise fail(f"{len(failed)} of {len(results)} slides failed: {failed[0].error}", code=1)


def _print_result(console: Console, result: EncodedSlide, out: Path, *, heatmaps: bool) -> None:
    """Print what became of a slide, and draw its heat-map."""
    name = result.source.name
    if result.status == "failed":
        console.print(f"{name}: failed: {result.error}")
        return
    if result.report is None:
        return
    for line in result.report.lines():
        console.print(f"{name}: {line}")
    if result.order_change is not None:
        console.print(f"{name}: the other order changes the embedding by {result.order_change:.1%}")
    if heatmaps and result.cells is not None and result.attention is not None:
        from dilated_models.drawing.slide_png import draw_slide_png

        path = out / f"{result.source.stem}.png"
        draw_slide_png(result.cells, result.attention, path, title=result.source.stem)
