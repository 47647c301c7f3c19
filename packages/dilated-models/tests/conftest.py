import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from dilated_core import DilatedPattern, reference_dilated_attention
from dilated_models import LongNetConfig, LongNetLM
from torch.nn.functional import gelu, layer_norm, linear, relu


@pytest.fixture(autouse=True)
def not_by_uv(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hints name the command as it was started, and the tests may themselves run under `uv run`."""
    monkeypatch.delenv("UV_RUN_RECURSION_DEPTH", raising=False)


@pytest.fixture
def config() -> LongNetConfig:
    """Two blocks, four heads, and branches that divide neither each other nor the lengths used."""
    return LongNetConfig(
        num_tokens=61,
        d_model=32,
        nhead=4,
        num_decoder_layers=2,
        dim_feedforward=48,
        segment_lengths=(6, 16, 40),
        dilation_rates=(1, 3, 4),
    )


@pytest.fixture
def model(config: LongNetConfig) -> LongNetLM:
    torch.manual_seed(0)
    return LongNetLM(config, dtype=torch.float64)


@pytest.fixture
def tokens() -> torch.Tensor:
    return torch.randint(61, (2, 45), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="session")
def write_text() -> Callable[[Path], Path]:
    """Makes a folder of 30 small source files, some of them nested, and others to skip."""

    def write(folder: Path) -> Path:
        (folder / "nested").mkdir(parents=True)
        for i in range(30):
            name = f"nested/file{i}.py" if i % 3 == 0 else f"file{i}.py"
            body = "".join(f"def f{i}_{j}(x):\n    return x + {i * j}\n\n\n" for j in range(12 + i))
            (folder / name).write_text(body)
        (folder / "empty.py").touch()
        (folder / "image.png").write_bytes(b"\x89PNG\0\0" * 10)
        (folder / ".hidden").write_text("not text to train on")
        return folder

    return write


@pytest.fixture
def text(tmp_path: Path, write_text: Callable[[Path], Path]) -> Path:
    return write_text(tmp_path / "text")


class Naive:
    """A transformer written out from the definitions, without any module of ours.

    It has the weights of a model, and their gradients.
    """

    def __init__(self, config: Any, weights: dict[str, torch.Tensor]) -> None:
        self.config, self.weights = config, weights

    def linear(self, name: str, x: torch.Tensor) -> torch.Tensor:
        return linear(x, self.weights[f"{name}.weight"], self.weights.get(f"{name}.bias"))

    def norm(self, name: str, x: torch.Tensor) -> torch.Tensor:
        if f"{name}.weight" not in self.weights:
            return x
        weight, bias = self.weights[f"{name}.weight"], self.weights[f"{name}.bias"]
        return layer_norm(x, x.shape[-1:], weight, bias, self.config.layer_norm_eps)

    def heads(self, name: str, x: torch.Tensor) -> torch.Tensor:
        return self.linear(name, x).unflatten(-1, (-1, self.config.head_dim))

    def turned(self, x: torch.Tensor, sign: int) -> torch.Tensor:
        """Pairs of channels as complex numbers (arXiv 2104.09864 and 2212.10554)."""
        if self.config.positions not in ("rotary", "xpos"):
            return x
        pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous())
        place = torch.arange(x.shape[1], dtype=torch.float64)[:, None]
        share = torch.arange(pairs.shape[-1], dtype=torch.float64) / pairs.shape[-1]
        angle = place * 10_000**-share
        factor = torch.polar(torch.ones_like(angle), angle)
        if self.config.positions == "xpos":
            zeta = (share + 0.4) / 1.4
            factor = factor * zeta ** (sign * place / self.config.xpos_scale_base)
        return torch.view_as_real(pairs * factor[:, None]).flatten(-2)

    def attention(self, name: str, x: torch.Tensor, is_causal: bool) -> torch.Tensor:
        q, k, v = (self.heads(f"{name}.{part}_proj", x) for part in "qkv")
        config = self.config
        pattern = DilatedPattern(
            config.segment_lengths,
            config.dilation_rates,
            head_offsets=config.head_offsets,
            padding=config.padding,
        )
        if config.positions == "alibi":
            out = self.biased(q, k, v, pattern).flatten(-2)
            return self.linear(f"{name}.out_proj", self.norm(f"{name}.layer_norm", out))
        q, k = self.turned(q, 1), self.turned(k, -1)
        out = reference_dilated_attention(q, k, v, pattern, is_causal=is_causal).flatten(-2)
        return self.linear(f"{name}.out_proj", self.norm(f"{name}.layer_norm", out))

    def biased(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, pattern: DilatedPattern
    ) -> torch.Tensor:
        """Causal attention with ALiBi's bias (arXiv 2108.12409), from the pattern's counts."""
        S, H, D = q.shape[1:]
        groups, place = H // k.shape[2], torch.arange(S, dtype=torch.float64)
        k, v = (x.repeat_interleave(groups, 2) for x in (k, v))
        slopes = torch.tensor([2.0 ** (-8 * (h + 1) / H) for h in range(H)], dtype=torch.float64)
        distance = place[:, None] - place
        scores = torch.einsum("bmhd,bnhd->bhmn", q, k) / math.sqrt(D)
        scores = (
            scores + pattern.materialize(S, H).double().log() - slopes[:, None, None] * distance
        )
        scores = scores.masked_fill(distance < 0, -math.inf)
        return torch.einsum("bhmn,bnhd->bmhd", scores.softmax(-1), v)

    def cross_attention(
        self, name: str, x: torch.Tensor, memory: torch.Tensor, is_causal: bool
    ) -> torch.Tensor:
        q = self.heads(f"{name}.q_proj", x)
        groups = self.config.nhead // (self.config.num_kv_heads or self.config.nhead)
        k, v = (
            self.heads(f"{name}.{part}_proj", memory).repeat_interleave(groups, 2) for part in "kv"
        )
        scores = torch.einsum("bmhd,bnhd->bhmn", q, k) / math.sqrt(self.config.head_dim)
        if is_causal:
            scores = scores.masked_fill(torch.ones_like(scores[0, 0]).triu(1).bool(), -math.inf)
        out = torch.einsum("bhmn,bnhd->bmhd", scores.softmax(-1), v)
        return self.linear(f"{name}.out_proj", out.flatten(-2))

    def block(
        self,
        name: str,
        x: torch.Tensor,
        is_causal: bool,
        memory: torch.Tensor | None = None,
        memory_is_causal: bool = False,
    ) -> torch.Tensor:
        attended = self.norm(f"{name}.attention_norm", x)
        x = x + self.attention(f"{name}.attention", attended, is_causal)
        if memory is not None:
            normed = self.norm(f"{name}.cross_attention_norm", x)
            part = f"{name}.cross_attention"
            x = x + self.cross_attention(part, normed, memory, memory_is_causal)
        hidden = self.linear(f"{name}.feed_forward.fc1", self.norm(f"{name}.feed_forward_norm", x))
        hidden = relu(hidden) if self.config.activation == "relu" else gelu(hidden)
        hidden = self.norm(f"{name}.feed_forward.layer_norm", hidden)
        return x + self.linear(f"{name}.feed_forward.fc2", hidden)

    def embed(self, x: torch.Tensor) -> torch.Tensor:
        if x.is_floating_point():
            return x
        scale = math.sqrt(self.config.d_model) if self.config.scale_embedding else 1
        return self.weights["embedding.weight"][x] * scale

    def encode(self, x: torch.Tensor, is_causal: bool = False) -> torch.Tensor:
        x = self.embed(x)
        for i in range(self.config.num_encoder_layers):
            x = self.block(f"encoder_blocks.{i}", x, is_causal)
        return self.norm("encoder_norm", x)

    def decode(
        self,
        x: torch.Tensor,
        memory: torch.Tensor | None,
        is_causal: bool = True,
        memory_is_causal: bool = False,
    ) -> torch.Tensor:
        x = self.embed(x)
        for i in range(self.config.num_decoder_layers):
            x = self.block(f"blocks.{i}", x, is_causal, memory, memory_is_causal)
        x = self.norm("final_norm", x)
        return self.linear("output", x) if "output.weight" in self.weights else x


@pytest.fixture
def naive() -> Callable[[torch.nn.Module], Naive]:
    return lambda model: Naive(model.config, dict(model.state_dict(keep_vars=True)))


@pytest.fixture(scope="session")
def naive_class() -> type[Naive]:
    return Naive
