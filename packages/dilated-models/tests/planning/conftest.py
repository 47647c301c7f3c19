from collections.abc import Callable

import pytest
import torch
from dilated_models import LongNetConfig, LongNetLM
from dilated_models.planning.job import Job
from torch import nn
from torch.nn.functional import cross_entropy


@pytest.fixture
def config() -> LongNetConfig:
    """Large enough that tensors of activations outweigh small ones."""
    return LongNetConfig(
        num_tokens=64, d_model=64, nhead=4, num_decoder_layers=2, dim_feedforward=192,
        segment_lengths=(64, 256), dilation_rates=(1, 4),
    )  # fmt: skip


class Training:
    """The steps of `dilated train` for a job, by hand."""

    def __init__(self, job: Job) -> None:
        torch.manual_seed(0)
        self.job = job
        self.model = LongNetLM(job.model).train()
        self.optimizer = torch.optim.AdamW(self.model.parameters())

    def step(self, optimizer: bool = True) -> None:
        job = self.job
        tokens = torch.zeros(job.tokens, dtype=torch.int64)
        bounds = torch.arange(job.rows + 1) * job.seq_len
        self.optimizer.zero_grad(set_to_none=True)
        for _ in range(job.accumulation):
            with torch.autocast("cpu", torch.bfloat16, enabled=job.dtype == "bfloat16"):
                if job.chunked_loss:
                    loss = self.model.loss(tokens, tokens, cu_seqlens=bounds)
                else:
                    logits = self.model(tokens, cu_seqlens=bounds)
            if not job.chunked_loss:
                loss = cross_entropy(logits.float(), tokens)
                del logits  # as when a function returns
            loss.backward()
            del loss
        if optimizer:
            nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            self.optimizer.step()


@pytest.fixture
def training_of() -> Callable[[Job], Training]:
    return Training
