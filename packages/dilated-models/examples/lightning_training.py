"""Train a LongNet with Lightning: `python lightning_training.py FILE`, extra `lightning`."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning
import torch
from dilated_models import LongNetConfig, LongNetLM, generate
from torch.utils.data import DataLoader


class LongNetModule(lightning.LightningModule):
    """A LongNet and how Lightning trains it."""

    def __init__(self, config: LongNetConfig, learning_rate: float) -> None:
        super().__init__()
        self.save_hyperparameters({"config": config.to_dict(), "learning_rate": learning_rate})
        self.model = LongNetLM(config)

    def training_step(self, tokens: torch.Tensor) -> torch.Tensor:
        """The loss of a batch `(B, S)`, without the logits of all its tokens."""
        loss = self.model.loss(tokens)
        self.log("loss", loss, prog_bar=True)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """AdamW with the decay of the paper."""
        return torch.optim.AdamW(
            self.parameters(), lr=self.hparams["learning_rate"], betas=(0.9, 0.98)
        )


def windows_of(text: bytes, seq_len: int) -> Sequence[torch.Tensor]:
    """The text in windows of `seq_len` bytes."""
    return torch.frombuffer(bytearray(text), dtype=torch.uint8).long().split(seq_len)[:-1]


def train(text: bytes, *, steps: int, seq_len: int = 256, **options: Any) -> LongNetLM:
    """Train a small LongNet on the text; `options` are those of `lightning.Trainer`."""
    lightning.seed_everything(0)
    config = LongNetConfig(
        num_tokens=256,
        d_model=64,
        nhead=4,
        num_decoder_layers=2,
        dim_feedforward=128,
        segment_lengths=[seq_len // 4, seq_len],
        dilation_rates=[1, 4],
    )
    module = LongNetModule(config, learning_rate=3e-3)
    trainer = lightning.Trainer(max_steps=steps, gradient_clip_val=2.0, **options)
    trainer.fit(module, DataLoader(windows_of(text, seq_len), batch_size=4, shuffle=True))
    return module.model


if __name__ == "__main__":
    trained = train(Path(sys.argv[1]).read_bytes(), steps=200)
    print(bytes(generate(trained, b"The ", max_new_tokens=100, temperature=0.8, seed=0)))
