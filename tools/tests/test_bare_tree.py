"""The packages are usable, versions and entry points included, where nothing is installed."""

import json
import os
import subprocess
import sys

from tools.bare_tree import bare_environment, write_metadata

ASK = """
import json
from importlib.metadata import distribution, entry_points, version
found = {
    "version": version("dilated-one"),
    "requires": distribution("dilated-one").requires,
    "backends": {e.name: e.load() for e in entry_points(group="dilated.backends")},
    "scripts": [e.value for e in entry_points(group="console_scripts") if e.name == "one"],
    "other": version("dilated-two"),
}
print(json.dumps(found))
"""


def test_a_new_process_finds_versions_and_entry_points(tmp_path, make_package):
    one = make_package("dilated-one", version="3.4.5", dependencies=["dilated-two>=0.1"])
    make_package("dilated-two", version="0.1.7")
    with (one / "pyproject.toml").open("a") as file:
        file.write(
            '\n[project.scripts]\none = "dilated_one:main"\n'
            '\n[project.entry-points."dilated.backends"]\nfirst = "dilated_one:NAME"\n'
        )
    (one / "src/dilated_one/__init__.py").write_text('NAME = "from the tree"\n')
    write_metadata(tmp_path, tmp_path / "metadata")
    environment = bare_environment(tmp_path, tmp_path / "metadata", {})
    # Without the site module there is no installed package at all.
    command = [sys.executable, "-S", "-c", ASK]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert json.loads(run.stdout) == {
        "version": "3.4.5",
        "requires": ["dilated-two>=0.1"],
        "backends": {"first": "from the tree"},
        "scripts": ["dilated_one:main"],
        "other": "0.1.7",
    }


def test_the_tree_comes_before_what_was_on_the_path(tmp_path, make_package):
    make_package("dilated-one")
    environment = bare_environment(tmp_path, tmp_path / "metadata", {"PYTHONPATH": "/elsewhere"})
    paths = environment["PYTHONPATH"].split(os.pathsep)
    src = tmp_path / "packages/dilated-one/src"
    assert paths == [str(tmp_path / "metadata"), str(src), "/elsewhere"]
    assert bare_environment(tmp_path, tmp_path, {"A": "b"})["A"] == "b"
