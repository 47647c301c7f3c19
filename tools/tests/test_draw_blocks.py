from dilated_sparse import BlockPattern

from tools.draw_blocks import ABOVE, KEPT, draw, main


def test_the_committed_picture_is_current(capsys):
    assert main(["--check"]) == 0, capsys.readouterr().out


def test_an_old_picture_is_noticed(tmp_path, capsys):
    picture = tmp_path / "blocks.svg"
    assert main(["--check", "--picture", str(picture)]) == 1
    assert main(["--picture", str(picture)]) == 0
    picture.write_text(picture.read_text().replace(KEPT, ABOVE))
    assert main(["--check", "--picture", str(picture)]) == 1
    assert "is out of date; write it with" in capsys.readouterr().out


def test_one_square_per_kept_block():
    svg = draw({"two": BlockPattern.from_rows([[0, 1], [1]])})
    assert (svg.count(KEPT), svg.count(ABOVE)) == (2, 1)
