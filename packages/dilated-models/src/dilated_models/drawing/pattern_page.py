"""A pattern as one HTML page that loads nothing: a square per head, and what each query sees."""

from __future__ import annotations

import json
from pathlib import Path

from dilated_models.drawing.page import write_page
from dilated_models.drawing.pattern_keys import NONE, PatternPicture


def write_pattern_page(picture: PatternPicture, path: Path) -> None:
    """Write the page."""
    data = {
        "seq_len": picture.seq_len,
        "rates": list(picture.pattern.dilation_rates),
        "legend": picture.legend,
        "none": NONE,
        # Of each branch the first key and how many: the rate gives the others.
        "keys": [
            [
                [number for keys in picture.keys(head, query) for number in (keys.start, len(keys))]
                for query in range(picture.seq_len)
            ]
            for head in range(picture.num_heads)
        ],
    }
    write_page(
        path,
        "pattern_page.html",
        title=picture.title,
        data=json.dumps(data, separators=(",", ":")),
    )
