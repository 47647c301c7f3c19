from tools.planning_table import PAGE, main


def test_the_tables_of_the_page_are_current(capsys):
    assert main(["--check"]) == 0, capsys.readouterr().out


def test_an_old_table_is_noticed(tmp_path, capsys):
    page = tmp_path / "page.md"
    page.write_text(PAGE.read_text().replace("| 1,024 |", "| 1,025 |"))
    assert main(["--check", "--page", str(page)]) == 1
    assert "is out of date; write it with" in capsys.readouterr().out
