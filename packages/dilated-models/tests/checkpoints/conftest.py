import json
from pathlib import Path

import pytest
from safetensors import safe_open

DATA = Path(__file__).parent.parent / "data"


@pytest.fixture(scope="session")
def golden():
    """Reads a file of results of the published code: its config, weights, and other tensors."""

    def read(name):
        with safe_open(DATA / f"{name}.safetensors", framework="pt") as file:
            config = json.loads(file.metadata()["config"])
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        weights = {
            key.removeprefix("model."): tensor
            for key, tensor in tensors.items()
            if key.startswith("model.")
        }
        return config, weights, tensors

    return read
