from tools.draw_design import PICTURES, main


def test_the_committed_pictures_are_current(capsys):
    assert main(["--check"]) == 0, capsys.readouterr().out


def test_an_old_picture_is_noticed(tmp_path, capsys):
    assert main(["--check", "--folder", str(tmp_path)]) == 1
    assert main(["--folder", str(tmp_path)]) == 0
    assert main(["--check", "--folder", str(tmp_path)]) == 0
    picture = tmp_path / sorted(PICTURES)[0]
    picture.write_text(picture.read_text().replace("after 21", "after 22"))
    assert main(["--check", "--folder", str(tmp_path)]) == 1
    assert "cache.svg is out of date; write it with" in capsys.readouterr().out
