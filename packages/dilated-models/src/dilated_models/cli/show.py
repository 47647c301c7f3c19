"""`dilated show pattern` and `dilated show attention`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, cast

import typer

from dilated_models.cli.options import CheckpointOption, DeviceOption, integers
from dilated_models.cli.prompt import read_prompt

show = typer.Typer(
    name="show", help="Draw a pattern, or what a trained model attended to.", no_args_is_help=True
)

_OutOption = Annotated[
    Path, typer.Option("--out", metavar="FILE", help="A .png file, or an .html page of its own.")
]


@show.command()
def pattern(
    segment_lengths: Annotated[
        str, typer.Option(metavar="N,N", help="Segment length of each branch.")
    ],
    dilation_rates: Annotated[
        str, typer.Option(metavar="N,N", help="Dilation rate of each branch.")
    ],
    heads: Annotated[int, typer.Option(help="Number of heads, one square each.")] = 4,
    seq_len: Annotated[int, typer.Option(help="Number of positions, up to 2048.")] = 256,
    causal: Annotated[
        bool, typer.Option(help="Whether queries see no later position, as in the models.")
    ] = True,
    head_offsets: Annotated[
        str, typer.Option(help="interleaved (the paper), or blocked (published weights).")
    ] = "interleaved",
    out: _OutOption = Path("pattern.png"),
) -> None:
    """Draw which keys each query sees, in each head."""
    suffix = _checked_suffix(out)
    lengths = integers("--segment-lengths", segment_lengths)
    rates = integers("--dilation-rates", dilation_rates)
    from dilated_core import DilatedPattern

    from dilated_models.drawing.pattern_keys import PatternPicture
    from dilated_models.drawing.pattern_page import write_pattern_page
    from dilated_models.drawing.pattern_png import draw_pattern_png

    assert lengths is not None
    assert rates is not None
    picture = PatternPicture(
        pattern=DilatedPattern(lengths, rates, head_offsets=cast(Any, head_offsets)),
        num_heads=heads,
        seq_len=seq_len,
        is_causal=causal,
    )
    draw = write_pattern_page if suffix == ".html" else draw_pattern_png
    draw(picture, out)
    typer.echo(f"wrote {out}")


@show.command()
def attention(
    checkpoint: CheckpointOption,
    prompt: Annotated[
        str | None, typer.Option(help="Text to read. By default, what is piped to stdin.")
    ] = None,
    prompt_file: Annotated[
        Path | None, typer.Option(metavar="FILE", help="File with the text to read; - is stdin.")
    ] = None,
    rows: Annotated[
        int, typer.Option(metavar="N", help="Show the attention of the last N tokens.")
    ] = 8,
    layers: Annotated[
        str | None, typer.Option(metavar="N,N", help="Only these layers, counted from 0.")
    ] = None,
    device: DeviceOption = "auto",
    out: _OutOption = Path("attention.html"),
) -> None:
    """Show which tokens a prompt's last tokens attended to, in each layer and head."""
    suffix = _checked_suffix(out)
    text = read_prompt(prompt, prompt_file)
    if not text:
        raise ValueError("the prompt is empty; it must hold at least one token.")
    if rows < 1:
        raise ValueError(f"--rows is {rows}; it must be at least 1.")
    wanted = integers("--layers", layers)
    from dilated_models.drawing.attention_page import write_attention_page
    from dilated_models.drawing.attention_png import draw_attention_png
    from dilated_models.drawing.cells import cut_into_cells
    from dilated_models.drawing.prompt_attention import attend_to_prompt
    from dilated_models.longnet.saving import load_model, load_vocabulary
    from dilated_models.training.devices import choose_device

    model = load_model(checkpoint, device=choose_device(device))
    num_layers = model.config.num_decoder_layers
    for layer in wanted or []:
        if not 0 <= layer < num_layers:
            raise ValueError(
                f"--layers holds {layer}; the model has the layers 0 to {num_layers - 1}."
            )
    vocabulary = load_vocabulary(checkpoint)
    tokens = vocabulary.encode(text.decode("utf-8", "surrogateescape"))
    seen = attend_to_prompt(model, tokens, num_rows=rows)
    draw = write_attention_page if suffix == ".html" else draw_attention_png
    draw(seen, cut_into_cells(tokens, vocabulary), wanted or range(num_layers), out)
    typer.echo(f"wrote {out}")


def _checked_suffix(out: Path) -> str:
    """The kind of file, checked before any work."""
    suffix = out.suffix.lower()
    if suffix not in (".png", ".html"):
        raise ValueError(f"--out is {str(out)!r}; it must end with .png or .html.")
    if out.is_dir():
        raise ValueError(f"--out is {str(out)!r}, which is a folder; it must be a file.")
    if not out.parent.is_dir():
        raise ValueError(
            f"--out is {str(out)!r} and there is no folder {str(out.parent)!r}; make it first."
        )
    return suffix
