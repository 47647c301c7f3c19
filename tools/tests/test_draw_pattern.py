import re

from dilated_core import DilatedPattern

from tools.draw_pattern import NUM_HEADS, PATTERN, SEQ_LEN, draw, main


def test_the_committed_picture_is_current(capsys):
    assert main(["--check"]) == 0, capsys.readouterr().out


def test_an_old_picture_is_noticed(tmp_path, capsys):
    picture = tmp_path / "pattern.svg"
    assert main(["--check", "--picture", str(picture)]) == 1
    assert main(["--picture", str(picture)]) == 0
    assert main(["--check", "--picture", str(picture)]) == 0
    picture.write_text(picture.read_text().replace("head 1", "head 7"))
    assert main(["--check", "--picture", str(picture)]) == 1
    assert "is out of date; write it with" in capsys.readouterr().out


def test_one_bar_per_counted_pair():
    legend = len(PATTERN.branches)
    bars = len(re.findall(r'fill="#(?:4263eb|f59f00|0ca678)"', draw(PATTERN, SEQ_LEN, NUM_HEADS)))
    assert bars - legend == PATTERN.materialize(SEQ_LEN, NUM_HEADS).sum()
    assert draw(DilatedPattern([2], [1]), 4, 1) != draw(DilatedPattern([4], [1]), 4, 1)
