import html
import json
import re

import numpy as np
import pytest
from dilated_models.drawing.attention_page import write_attention_page
from dilated_models.drawing.attention_png import MOST_STRIPS, _pixels, draw_attention_png
from dilated_models.drawing.cells import cut_into_cells
from dilated_models.drawing.prompt_attention import PromptAttention
from dilated_models.text.vocabulary import ByteVocabulary


def drawn(text: str, *, rows=3, layers=2, heads=2, keys=None):
    """Random attention of the last bytes of a text, each to the last `keys` before it."""
    tokens = list(text.encode())
    S, K = len(tokens), keys or len(tokens)
    chosen = list(range(S - rows, S))
    positions = np.full((heads, rows, K), -1)
    for i, row in enumerate(chosen):
        seen = np.arange(max(0, row + 1 - K), row + 1)
        positions[:, i, : len(seen)] = seen
    shares = np.random.default_rng(0).random((layers, heads, rows, K)) * (positions >= 0)
    shares = (shares / shares.sum(-1, keepdims=True)).astype(np.float32)
    attention = PromptAttention(chosen, positions, shares)
    return attention, cut_into_cells(tokens, ByteVocabulary())


def page_of(tmp_path, attention, cells, layers=(0, 1)):
    write_attention_page(attention, cells, layers, tmp_path / "a.html")
    page = (tmp_path / "a.html").read_text("utf-8")
    return page, json.loads(re.search(r"const data = (.*);\n", page)[1])


def test_the_page_holds_the_shares_of_characters(tmp_path):
    attention, cells = drawn("né中x")  # 7 bytes, 4 characters
    page, data = page_of(tmp_path, attention, cells, layers=[1])
    # The last rows are the last two bytes of the third character, and x.
    assert data["queries"] == [2, 3]
    assert data["layers"] == [1]
    for head in range(2):
        assert data["cells"][head] == [[0, 1, 2], [0, 1, 2, 3]]
        for i, row in enumerate((1, 2)):
            shares = attention.probabilities[1, head, row]
            sums = [shares[:1].sum(), shares[1:3].sum(), shares[3:6].sum(), shares[6:].sum()]
            found = np.array(data["weights"][0][head][i]) / data["scale"]
            np.testing.assert_allclose(found, sums[: 3 + i], atol=1e-4)
    assert '<span class="query" data-cell="2" data-at="3" data-text="中">中</span>' in page


@pytest.mark.parametrize("text", ["</script>", "&<b>\"'", "__DATA__ __TITLE__", "\x1b[31m\n"])
def test_the_text_of_a_prompt_is_only_text(tmp_path, text):
    attention, cells = drawn(f"say {text}!")
    page, _ = page_of(tmp_path, attention, cells)
    assert page.count("</script>") == 1
    assert "\x1b" not in page
    shown = page[page.index('<div id="prompt">') + 17 : page.index("</div>\n<script>")]
    plain = html.unescape(re.sub(r"<[^>]*>", "", shown))
    assert plain == f"say {text}!".replace("\x1b", r"\x1b").replace("\n", "↵\n")


def test_the_page_loads_nothing(tmp_path):
    page, _ = page_of(tmp_path, *drawn("some text"))
    assert not re.search(r"https?:|src=|@import|url\(", page)


def test_a_long_unseen_part_is_left_out(tmp_path):
    attention, cells = drawn("x" * 100_000, keys=300)
    page, data = page_of(tmp_path, attention, cells)
    assert "… 99,538 tokens that no shown query sees …" in page
    assert len(page) < 60_000
    assert data["first"] == 99_698


def test_png(tmp_path):
    for text in ("a $b_ \n 中\x1b", "long " * 500):
        draw_attention_png(*drawn(text), [0, 1], tmp_path / "a.png")
        assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


def test_a_column_shows_the_largest_probability_of_its_positions():
    attention, _ = drawn("x" * 4000, keys=1600)
    pixels = _pixels(attention, 1, 0, 2400, 4000)
    assert pixels.shape == (3, 800)
    last = attention.probabilities[1, 0, 2]
    np.testing.assert_array_equal(pixels[2], last.reshape(800, 2).max(-1))
    attention, _ = drawn("x" * 10, keys=4)
    pixels = _pixels(attention, 0, 1, 4, 10)
    np.testing.assert_array_equal(np.isnan(pixels[0]), [False] * 4 + [True] * 2)
    np.testing.assert_array_equal(pixels[0, :4], attention.probabilities[0, 1, 0])


def test_too_many_strips_are_refused(tmp_path):
    attention, cells = drawn("abc", heads=2)
    with pytest.raises(ValueError, match=r"49 layers of 2 heads are 98 strips.*--layers"):
        draw_attention_png(attention, cells, range(MOST_STRIPS // 2 + 1), tmp_path / "a.png")
    assert not list(tmp_path.iterdir())
