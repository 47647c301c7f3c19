import copy
import json
import re
from itertools import pairwise
from xml.etree import ElementTree

import pytest

from tools.benchmark_table import RESULTS, duration
from tools.draw_length import DENSE, DILATED, draw, main

RESULT = json.loads((RESULTS / "length.json").read_text())
FORWARD = [row for row in RESULT["rows"] if row["part"] == "forward"]


def test_the_committed_picture_is_current(capsys):
    assert main(["--check"]) == 0, capsys.readouterr().out


def test_an_old_picture_is_noticed(tmp_path, capsys):
    picture = tmp_path / "length.svg"
    assert main(["--check", "--picture", str(picture)]) == 1
    assert main(["--picture", str(picture)]) == 0
    changed = copy.deepcopy(RESULT)
    changed["rows"][0]["dilated"]["best_s"] *= 2
    (tmp_path / "length.json").write_text(json.dumps(changed))
    assert main(["--check", "--results", str(tmp_path), "--picture", str(picture)]) == 1
    assert "is out of date; write it with" in capsys.readouterr().out


@pytest.mark.parametrize("measured", [len(FORWARD), 3, 1])
def test_a_dot_is_a_measurement_and_the_rest_is_dashed(measured):
    result = copy.deepcopy(RESULT)
    rows = [row for row in result["rows"] if row["part"] == "forward"]
    for i, row in enumerate(rows):
        row["dense"]["extrapolated"] = i >= measured
    svg = draw(result)
    ElementTree.fromstring(svg)
    dots = re.findall(r'<circle cx="([\d.]+)" cy="([\d.]+)" r="4.5" fill="(#\w+)"/>', svg)
    assert [colour for *_, colour in dots].count(DENSE) == measured
    assert [colour for *_, colour in dots].count(DILATED) == len(rows)
    is_extrapolated = measured < len(rows)
    assert ("stroke-dasharray" in svg, ">extrapolated<" in svg) == (is_extrapolated,) * 2
    assert f">{duration(rows[-1]['dilated']['best_s'])}</text>" in svg
    # On logarithmic axes, lengths four times each other are equally far apart.
    xs = [float(x) for x, _, colour in dots if colour == DILATED]
    gaps = [b - a for a, b in pairwise(xs)]
    assert gaps == pytest.approx([gaps[0]] * len(gaps), abs=0.2)
    ys = [float(y) for _, y, colour in dots if colour == DILATED]
    assert ys == sorted(ys, reverse=True)
