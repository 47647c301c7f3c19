"""A run's folder: one process at a time, and nothing left of a run that was not begun."""

import os
import subprocess
import sys

import pytest
from dilated_models.training.folder import LOCK_FILE, check_free, hold


def test_a_folder_is_made_and_kept_once_a_run_is_begun(tmp_path):
    folder = tmp_path / "deep" / "run"
    with hold(folder, is_new=True):
        assert (folder / LOCK_FILE).read_text() == f"{os.getpid()}\n"
        (folder / "config.json").touch()
    assert os.listdir(folder) == ["config.json"]
    with pytest.raises(FileExistsError, match="already holds a run"), hold(folder, is_new=True):
        pass
    with hold(folder, is_new=False):
        pass
    assert os.listdir(folder) == ["config.json"]


def test_a_link_to_nothing_is_no_folder(tmp_path):
    (tmp_path / "link").symlink_to("nowhere")
    for folder in (tmp_path / "link", tmp_path / "link" / "run"):
        with pytest.raises(FileExistsError, match="link' is a symbolic link to nothing; --out"):
            check_free(folder)


def test_a_run_that_was_not_begun_leaves_nothing(tmp_path):
    def fail() -> None:
        with hold(tmp_path / "deep" / "run", is_new=True):
            (tmp_path / "deep" / "run" / "model.safetensors").touch()
            raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        fail()
    assert os.listdir(tmp_path) == []
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "notes").touch()
    with hold(mine, is_new=True):
        pass
    assert os.listdir(mine) == ["notes"]  # a folder that was there stays


def test_a_second_process_is_refused_and_a_killed_one_leaves_no_lock(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "config.json").touch()
    code = (
        "import sys, time; from pathlib import Path\n"
        "from dilated_models.training.folder import hold\n"
        "with hold(Path(sys.argv[1]), is_new=False):\n"
        "    (Path(sys.argv[1]) / '.model.safetensors.0.part').touch()\n"
        "    print('held', flush=True); time.sleep(600)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code, folder], stdout=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stdout.readline() == b"held\n"
    with pytest.raises(ValueError) as caught, hold(folder, is_new=False):
        pass
    assert f"another process ({process.pid}) writes to '{folder}'" in str(caught.value)
    assert (folder / ".model.safetensors.0.part").exists()
    process.kill()
    process.wait()
    process.stdout.close()
    assert (folder / LOCK_FILE).exists()  # the file, not the lock
    with hold(folder, is_new=False):
        assert not (folder / ".model.safetensors.0.part").exists()
    assert os.listdir(folder) == ["config.json"]


@pytest.mark.skipif(os.name != "posix", reason="makes a symbolic link")
def test_a_link_is_not_followed(tmp_path):
    precious = tmp_path / "precious"
    precious.write_text("precious")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / LOCK_FILE).symlink_to(precious)
    with pytest.raises(OSError, match="symbolic"), hold(tmp_path / "run", is_new=True):
        pass
    assert precious.read_text() == "precious"


def test_a_file_in_the_way(tmp_path):
    (tmp_path / "file").touch()
    for path in (tmp_path / "file", tmp_path / "file" / "run"):
        with (
            pytest.raises(FileExistsError, match="is a file; --out must be"),
            hold(path, is_new=True),
        ):
            pass
    assert os.listdir(tmp_path) == ["file"]
