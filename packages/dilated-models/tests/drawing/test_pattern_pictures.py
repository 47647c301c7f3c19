import json
import re

import numpy as np
import pytest
from dilated_core import DilatedPattern
from dilated_models.drawing.pattern_keys import COLOURS, NONE, SEVERAL, PatternPicture
from dilated_models.drawing.pattern_page import write_pattern_page
from dilated_models.drawing.pattern_png import _pixels, draw_pattern_png


def picture(lengths=(6, 16, 40), rates=(1, 3, 4), *, seq_len=45, heads=4, causal=True):
    return PatternPicture(
        pattern=DilatedPattern(lengths, rates), num_heads=heads, seq_len=seq_len, is_causal=causal
    )


def rgb(colour):
    return [int(colour[i : i + 2], 16) for i in (1, 3, 5)]


@pytest.mark.parametrize("causal", [False, True])
def test_pixels_are_the_counts_of_the_pattern(causal):
    drawn = picture(causal=causal)
    counts = drawn.pattern.materialize(45, 4, is_causal=causal).numpy()
    branches = [
        DilatedPattern([w], [r]).materialize(45, 4, is_causal=causal).numpy()
        for w, r in drawn.pattern.branches
    ]
    for head in range(4):
        pixels = _pixels(drawn, head)
        assert pixels.shape == (45, 45, 3)
        np.testing.assert_array_equal((pixels == rgb(NONE)).all(-1), counts[head] == 0)
        np.testing.assert_array_equal((pixels == rgb(SEVERAL)).all(-1), counts[head] > 1)
        for colour, branch in zip(COLOURS, branches, strict=False):
            alone = (counts[head] == 1) & (branch[head] == 1)
            np.testing.assert_array_equal((pixels == rgb(colour)).all(-1), alone)


def test_the_page_holds_the_keys_and_loads_nothing(tmp_path):
    drawn = picture()
    write_pattern_page(drawn, tmp_path / "p.html")
    page = (tmp_path / "p.html").read_text("utf-8")
    assert not re.search(r"https?:|src=|@import|url\(", page)
    data = json.loads(re.search(r"const data = (.*);\n", page)[1])
    counts = np.zeros((4, 45, 45), int)
    for head, queries in enumerate(data["keys"]):
        for query, numbers in enumerate(queries):
            for branch, rate in enumerate(data["rates"]):
                first, count = numbers[2 * branch : 2 * branch + 2]
                for i in range(count):
                    counts[head, query, first + i * rate] += 1
    np.testing.assert_array_equal(counts, drawn.pattern.materialize(45, 4, is_causal=True).numpy())
    assert "w = 16, r = 3" in page


@pytest.mark.parametrize("heads", [1, 5])
def test_png(tmp_path, heads):
    draw_pattern_png(picture(heads=heads), tmp_path / "p.png")
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seq_len": 2049}, "seq_len is 2049; a picture shows at most 2,048"),
        ({"seq_len": 0}, "seq_len is 0"),
        ({"heads": 65}, "num_heads is 65; a picture shows at most 64"),
        ({"lengths": [8] * 9, "rates": range(1, 10)}, "9 branches; a picture has colours for"),
    ],
)
def test_what_does_not_fit_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        picture(**options)
