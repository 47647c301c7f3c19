"""The examples train inside Lightning and inside the Trainer of transformers, on the CPU."""

import runpy
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from dilated_models import LongNetLM

EXAMPLES = Path(__file__).parents[2] / "examples"
TEXT = b"the same line of text again, and one more of it.\n" * 40


def names_of(example: str) -> dict[str, Any]:
    return runpy.run_path(str(EXAMPLES / example))


def loss_of(model: LongNetLM) -> float:
    with torch.no_grad():
        return model.loss(torch.tensor([list(TEXT[:64])])).item()


@pytest.mark.exhaustive  # importing Lightning takes as long as the test
def test_lightning(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of Lightning's own imports
        pytest.importorskip("lightning")
        train = names_of("lightning_training.py")["train"]
        model = train(
            TEXT,
            steps=12,
            seq_len=64,
            default_root_dir=tmp_path,
            accelerator="cpu",
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        # A checkpoint of Lightning has the weights of the model.
        (path,) = tmp_path.rglob("*.ckpt")
        saved = torch.load(path, weights_only=True)["state_dict"]
    weights = {name.removeprefix("model."): x for name, x in saved.items()}
    assert all(torch.equal(weights[name], x) for name, x in model.state_dict().items())
    assert loss_of(model) < 4.0  # from 5.5


def test_the_trainer_of_transformers(tmp_path):
    pytest.importorskip("accelerate")
    train = names_of("transformers_training.py")["train"]
    trainer = train(
        TEXT,
        tmp_path,
        steps=12,
        seq_len=64,
        use_cpu=True,
        disable_tqdm=True,
        save_strategy="no",
        logging_steps=4,
    )
    assert loss_of(trainer.model.eval().lm) < 4.0
    assert (tmp_path / "model.safetensors").is_file()
