"""Train a LongNet with the Trainer of transformers: `python transformers_training.py FILE`.

It needs the extra `huggingface`, and accelerate, which the Trainer imports.
"""

import sys
from pathlib import Path
from typing import Any

import torch
from dilated_models.huggingface import LongNetForCausalLM, LongNetPretrainedConfig
from transformers import Trainer, TrainingArguments, set_seed


def windows_of(text: bytes, seq_len: int) -> list[dict[str, torch.Tensor]]:
    """The text in windows of `seq_len` bytes. Labels are the same; the model shifts them."""
    tokens = torch.frombuffer(bytearray(text), dtype=torch.uint8).long()
    return [{"input_ids": x, "labels": x} for x in tokens.split(seq_len)[:-1]]


def train(
    text: bytes, folder: str | Path, *, steps: int, seq_len: int = 256, **options: Any
) -> Trainer:
    """Train a small LongNet on the text; `options` are those of `TrainingArguments`."""
    set_seed(0)
    model = LongNetForCausalLM(
        LongNetPretrainedConfig(
            num_tokens=256,
            d_model=64,
            nhead=4,
            num_decoder_layers=2,
            dim_feedforward=128,
            segment_lengths=[seq_len // 4, seq_len],
            dilation_rates=[1, 4],
        )
    )
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=4,
        learning_rate=3e-3,
        lr_scheduler_type="polynomial",
        report_to=[],
        **options,
    )
    trainer = Trainer(model=model, args=arguments, train_dataset=windows_of(text, seq_len))
    trainer.train()
    trainer.save_model()
    return trainer


if __name__ == "__main__":
    train(Path(sys.argv[1]).read_bytes(), "runs/transformers", steps=200)
    trained = LongNetForCausalLM.from_pretrained("runs/transformers").eval()
    prompt = torch.tensor([list(b"The ")])
    print(bytes(trained.generate(prompt, max_new_tokens=100, do_sample=False)[0].tolist()))
