import pickle

import dilated_core
import dilated_models
import dilated_ring
import pytest
import torch

from tools.compatibility_table import DATA, Row, expected_ids, find, main, page, read, read_dropped

ROWS = read(DATA)


def test_the_committed_page_is_current(capsys):
    assert main(["--check"]) == 0, capsys.readouterr().out


def test_a_changed_row_is_noticed(tmp_path):
    data = tmp_path / "compatibility.toml"
    data.write_text(DATA.read_text().replace("one function and one module", "one function"))
    assert main(["--check", "--data", str(data)]) == 1
    reason = "Because one function leave nothing to share, wrap, cache or convert: "
    assert f"{reason}MemoryPoolConfig (CFG-06), " in page(data)


@pytest.mark.parametrize(
    "row", [r for r in ROWS if r.status in ("works", "alias")], ids=lambda r: r.id
)
def test_what_works_exists(row):
    find(row.target)


@pytest.mark.parametrize("row", [r for r in ROWS if r.check], ids=lambda r: r.id)
def test_documented_calls(row):
    packages = (dilated_core, dilated_models, dilated_ring)
    names = {n: getattr(m, n) for m in packages for n in m.__all__}
    names |= {"torch": torch, "pickle": pickle}
    names |= {"x3": torch.randn(1, 16, 8), "x4": torch.randn(1, 16, 2, 4)}
    assert eval(row.check, names) is True


def test_every_feature_has_one_row():
    dropped = [feature["id"] for group in read_dropped(DATA) for feature in group.features]
    order = expected_ids().index
    assert sorted([*(row.id for row in ROWS), *dropped], key=order) == expected_ids()
    text = page(DATA)
    assert all(text.count(f"| {row.id} |") == 1 for row in ROWS)
    assert all(text.count(f"({name})") == 1 for name in dropped)
    assert len(expected_ids()) == 178
    assert {"CORE-01", "RING-11d", "FAC-05e", "HIL-01", "TOOL-04"} <= set(expected_ids())


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            '{ id = "CORE-01", name = "x", status = "later", target = "dilated-ring" }',
            "CORE-01 more than once",
        ),
        (
            '{ id = "CORE-99", name = "x", status = "later", target = "dilated-ring" }',
            "not have, CORE-99",
        ),
    ],
)
def test_a_row_too_many(tmp_path, row, message):
    data = tmp_path / "compatibility.toml"
    data.write_text(DATA.read_text().replace("rows = [", f"rows = [\n  {row},"))
    with pytest.raises(ValueError, match=message):
        read(data)


@pytest.mark.parametrize(
    "change",
    [
        ('id = "ANA-03d"', 'id = "ANA-03d", check = ""', 'status = "later"', 'status = "soon"'),
        ('status = "later", target = "dilated-ring" }', 'status = "later", target = "ring" }'),
        (', target = "dilated_core.recommended_dtype" }', " }"),
    ],
)
def test_an_incomplete_row_is_refused(tmp_path, change):
    text = DATA.read_text()
    for old, new in zip(change[::2], change[1::2], strict=True):
        assert old in text
        text = text.replace(old, new)
    data = tmp_path / "compatibility.toml"
    data.write_text(text)
    with pytest.raises(ValueError, match="has no valid status, target and note"):
        read(data)


def test_a_target_that_does_not_exist():
    for target in (
        "dilated_core.nothing",
        "dilated_core.DilatedPattern.nothing",
        "no_such_package.thing",
        "docs/nothing.md",
        "nothing",
    ):
        with pytest.raises(LookupError):
            find(target)
    materialize = dilated_core.DilatedPattern.materialize
    assert find("dilated_core.pattern.branches.DilatedPattern.materialize") is materialize


def test_rows_read_as_sentences():
    for row in ROWS:
        assert isinstance(row, Row)
        assert not row.note or row.note.endswith(".")
        assert "|" not in row.name + row.note + row.target
