"""Fill a template of this folder into an HTML page that loads nothing."""

from __future__ import annotations

import html
from importlib.resources import files
from pathlib import Path

from dilated_core.atomic_write import write_atomically


def write_page(path: Path, template: str, *, title: str, prompt: str = "", data: str) -> None:
    """Write a page; `path` is whole or unchanged.

    Args:
        path: Of the page.
        template: Name of a file beside this module.
        title: Plain text.
        prompt: HTML.
        data: JSON, for the script of the page.
    """
    folder = files("dilated_models.drawing")
    page = folder.joinpath(template).read_text("utf-8")
    # "</script>" within a string of the data would end the script.
    parts = {
        "__STYLE__": folder.joinpath("page.css").read_text("utf-8"),
        "__TITLE__": html.escape(title),
        "__DATA__": data.replace("<", "\\u003c"),
        "__PROMPT__": prompt,  # last, so that a prompt that holds another name is left as it is
    }
    for name, text in parts.items():
        page = page.replace(name, text)
    with write_atomically(path) as part:
        part.write_text(page, "utf-8")
