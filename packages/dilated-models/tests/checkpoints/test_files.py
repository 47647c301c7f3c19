"""Files of weights: kinds, keys, digests, damage."""

import hashlib

import pytest
import torch
from dilated_models.checkpoints import read_checkpoint
from safetensors.torch import save_file

WEIGHTS = {"a.weight": torch.arange(6.0).view(2, 3), "b": torch.ones(1)}


def write(path, kind):
    if kind == "safetensors":
        save_file(WEIGHTS, path, {"made": "here"})
    elif kind == "bare":
        torch.save(WEIGHTS, path)
    else:
        torch.save({kind: WEIGHTS, "epoch": 3}, path)
    return path


@pytest.mark.parametrize("kind", ["safetensors", "bare", "model", "teacher"])
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_every_kind_of_file_is_read_whatever_its_name(tmp_path, kind, suffix):
    path = write(tmp_path / f"weights{suffix}", kind)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    checkpoint = read_checkpoint(path, keys=("model", "teacher"), sha256=digest.upper())
    assert checkpoint.sha256 == digest
    assert checkpoint.weights.keys() == WEIGHTS.keys()
    assert all(torch.equal(checkpoint.weights[name], WEIGHTS[name]) for name in WEIGHTS)
    assert checkpoint.metadata == ({"made": "here"} if kind == "safetensors" else {})


def test_another_digest_is_refused(tmp_path):
    path = write(tmp_path / "weights.pth", "model")
    with pytest.raises(ValueError, match=r"has the SHA-256 [0-9a-f]{64}; it must have 0{64}"):
        read_checkpoint(path, sha256="0" * 64)
    with pytest.raises(ValueError, match="64 hexadecimal digits"):
        read_checkpoint(path, sha256="abc")
    with pytest.raises(ValueError, match="which has no digest"):
        read_checkpoint(WEIGHTS, sha256="0" * 64)


def test_what_is_no_file_of_weights_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="No weights are drawn at random"):
        read_checkpoint(tmp_path / "absent.pth")
    for name, content in (("empty", b""), ("text", b"no weights"), ("zip", b"PK\3\4 cut short")):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match="holds no weights"):
            read_checkpoint(tmp_path / name)
    cut = write(tmp_path / "cut.safetensors", "safetensors").read_bytes()[:-4]
    (tmp_path / "cut.safetensors").write_bytes(cut)
    with pytest.raises(ValueError, match="damaged"):
        read_checkpoint(tmp_path / "cut.safetensors")
    whole = write(tmp_path / "whole.pth", "model").read_bytes()
    (tmp_path / "part.pth").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="holds no weights"):
        read_checkpoint(tmp_path / "part.pth")


class Runs:
    """Would run code when it is loaded."""

    def __reduce__(self):
        return (pytest.fail, ("code of the file ran",))


def test_no_code_in_a_file_is_run(tmp_path):
    torch.save({"model": WEIGHTS, "args": Runs()}, tmp_path / "code.pth")
    with pytest.raises(ValueError, match="without running its code"):
        read_checkpoint(tmp_path / "code.pth")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([1], "holds a list"),
        ({"a": 1}, "'a' of type int"),
        ({"student": WEIGHTS}, "may lie under 'student', and is looked for under 'model'"),
    ],
)
def test_entries_that_are_no_tensors_are_named(tmp_path, content, message):
    torch.save(content, tmp_path / "x.pth")
    with pytest.raises(TypeError, match=message):
        read_checkpoint(tmp_path / "x.pth")
