import random

import pytest
from dilated_models.drawing.cells import cut_into_cells, printable
from dilated_models.text.vocabulary import ByteVocabulary


def cells_of(data: bytes):
    return cut_into_cells(list(data), ByteVocabulary())


def test_the_bytes_of_a_character_are_one_cell():
    cells = cells_of("aé中🙂b".encode())
    assert [(cell.start, cell.stop, cell.text) for cell in cells] == [
        (0, 1, "a"),
        (1, 3, "é"),
        (3, 6, "中"),
        (6, 10, "🙂"),
        (10, 11, "b"),
    ]


@pytest.mark.parametrize(
    ("data", "texts"),
    [
        (b"a\xffb", ["a", r"\xff", "b"]),
        ("中".encode()[:2], [r"\xe4", r"\xb8"]),
        (b"\xc3a", [r"\xc3", "a"]),
        (b"\n\t\r \x1b\0", ["↵", "→", "␍", " ", r"\x1b", r"\x00"]),
    ],
)
def test_what_cannot_be_printed_is_escaped(data, texts):
    assert [cell.text for cell in cells_of(data)] == texts


def test_every_byte_is_in_one_printable_cell():
    random.seed(0)
    for _ in range(50):
        data = bytes(random.choices(range(256), k=40))
        cells = cells_of(data)
        assert [cell.start for cell in cells] == [0, *(cell.stop for cell in cells)][:-1]
        assert cells[-1].stop == 40
        assert all(cell.text and cell.text.isprintable() for cell in cells)
        for cell in cells:
            assert cell.ends_line == data[cell.start : cell.stop].endswith(b"\n")


def test_a_lone_surrogate_is_escaped():
    assert printable("a\udcff") == r"a\udcff"
