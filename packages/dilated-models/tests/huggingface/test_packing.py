"""Rows that transformers' collator packs, in the model and under its Trainer."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import DataCollatorWithFlattening, Trainer, TrainingArguments

Build = Callable[..., Any]
LENGTHS = [12, 1, 9, 14]


@pytest.fixture
def documents(tokens: torch.Tensor) -> list[dict[str, list[int]]]:
    return [{"input_ids": part.tolist()} for part in tokens[0, : sum(LENGTHS)].split(LENGTHS)]


def loss_alone(model: Any, documents: list[dict[str, list[int]]]) -> torch.Tensor:
    """Mean over the targets of all documents, each in a forward of its own."""
    losses = []
    for document in documents:
        ids = torch.tensor([document["input_ids"]])
        logits = model(ids).logits[0, :-1]
        losses.append(torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="none"))
    return torch.cat(losses).mean()


@pytest.mark.parametrize(
    "options", [{}, {"return_flash_attn_kwargs": True}, {"return_seq_idx": True}]
)
@torch.no_grad()
def test_rows_of_the_collator_are_documents_as_if_alone(
    llama: Any, documents: list[dict[str, list[int]]], options: dict[str, bool]
) -> None:
    batch = DataCollatorWithFlattening(**options)(documents)
    loss = llama(**batch, use_cache=False).loss
    torch.testing.assert_close(loss.double(), loss_alone(llama, documents), rtol=1e-6, atol=0)


@torch.no_grad()
def test_rows_of_the_collator_are_documents_in_an_encoder_too(
    build_model: Build, documents: list[dict[str, list[int]]]
) -> None:
    bert = build_model("bert")
    batch = DataCollatorWithFlattening(return_flash_attn_kwargs=True)(documents)
    batch.pop("labels")
    alone = [bert(torch.tensor([document["input_ids"]])).logits for document in documents]
    torch.testing.assert_close(bert(**batch).logits, torch.cat(alone, 1), rtol=1e-9, atol=1e-10)


def test_a_step_of_the_trainer_on_packed_rows_is_that_of_documents_alone(
    build_model: Build, documents: list[dict[str, list[int]]], tmp_path: Path
) -> None:
    pytest.importorskip("accelerate")
    model = build_model("llama").train()
    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=1,
        per_device_train_batch_size=len(LENGTHS),
        learning_rate=0.1,
        optim="sgd",
        max_grad_norm=0.0,
        report_to=[],
        save_strategy="no",
        use_cpu=True,
        disable_tqdm=True,
    )
    collator = DataCollatorWithFlattening()
    trainer = Trainer(model=model, args=arguments, train_dataset=documents, data_collator=collator)
    trainer.train()
    wanted = build_model("llama")
    loss_alone(wanted, documents).backward()
    for trained, before in zip(model.parameters(), wanted.parameters(), strict=True):
        stepped = before.detach() - 0.1 * before.grad
        torch.testing.assert_close(trained.detach(), stepped, rtol=1e-5, atol=1e-7)
