"""A configuration of DeepSpeed becomes options of a run, or is refused by the name of its key."""

import json
from pathlib import Path
from typing import Any

import pytest
from dilated_models.training.deepspeed import DeepSpeedConfig, merged_with, read_deepspeed


@pytest.fixture
def read(tmp_path: Path):
    def read_content(content: Any) -> DeepSpeedConfig:
        path = tmp_path / "deepspeed.json"
        path.write_text(json.dumps(content))
        return read_deepspeed(path)

    return read_content


def test_what_is_honoured(read) -> None:
    config = read(
        {
            "train_batch_size": 24,
            "gradient_accumulation_steps": 3,
            "gradient_clipping": 0.7,
            "zero_optimization": {"stage": 2, "overlap_comm": True, "reduce_bucket_size": 5e8},
            "optimizer": {
                "type": "AdamW",
                "params": {"lr": 2e-3, "betas": [0.8, 0.99], "eps": 1e-8, "weight_decay": "auto"},
            },
            "bf16": {"enabled": True},
            "fp16": {"enabled": False},
            "steps_per_print": 10,
        }
    )
    assert config.stage == 2
    # 4 ranks compute 24 rows in 3 parts of 2 rows each: the parts of one process have 2 rows too.
    assert config.training_over(4) == {
        "batch_size": 24,
        "accumulation": 12,
        "gradient_clip": 0.7,
        "learning_rate": 2e-3,
        "beta1": 0.8,
        "beta2": 0.99,
        "dtype": "bfloat16",
    }
    assert set(config.without_effect) == {
        "zero_optimization.overlap_comm",
        "zero_optimization.reduce_bucket_size",
        "optimizer.params.eps",
        "steps_per_print",
    }


@pytest.mark.parametrize(
    ("sizes", "batch_size", "accumulation"),
    [
        ((None, None, None), None, None),
        ((None, None, 4), None, None),
        ((None, 3, 2), 12, 4),
        ((None, 3, None), 6, 2),
        ((12, 3, None), 12, 4),
        ((12, None, None), 12, 2),
        (("auto", 3, 2), 12, 4),
    ],
)
def test_sizes_over_two_ranks(read, sizes, batch_size, accumulation) -> None:
    names = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
    given = {name: size for name, size in zip(names, sizes, strict=True) if size is not None}
    found = read(given).training_over(2)
    assert (found.get("batch_size"), found.get("accumulation")) == (batch_size, accumulation)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"zero_optimization": {"stage": 4}}, "zero_optimization.stage"),
        ({"zero_optimization": {"offload_optimizer": {}}}, "zero_optimization.offload_optimizer"),
        ({"scheduler": {"type": "WarmupLR"}}, "scheduler, which dilated train does not honour"),
        ({"optimizer": {"type": "Lamb"}}, "optimizer.type 'Lamb'; it must be Adam or AdamW"),
        ({"optimizer": {"params": {"eps": 1e-6}}}, "optimizer.params.eps 1e-06; it must be 1e-8"),
        ({"optimizer": {"params": {"adam_w_mode": False}}}, "it must be true"),
        ({"fp16": {"enabled": True}}, "fp16.enabled True; it must be false"),
        ({"train_batch_size": 0}, "train_batch_size"),
        ({"bf16": True}, "bf16 True; it must be an object"),
        ([], "holds no JSON object"),
    ],
)
def test_what_is_refused(read, content, message) -> None:
    with pytest.raises(ValueError) as caught:
        read(content)
    assert message in str(caught.value)


def test_what_contradicts(read, tmp_path) -> None:
    sizes = {"train_batch_size": 8, "train_micro_batch_size_per_gpu": 3}
    with pytest.raises(ValueError, match="train_batch_size must be the product"):
        read(sizes).training_over(2)
    with pytest.raises(ValueError, match="learning_rate is given as an option and in the"):
        merged_with({"learning_rate": 1}, {"learning_rate": 2}, "auto")
    with pytest.raises(ValueError, match="dtype is given"):
        merged_with({"dtype": "bfloat16"}, {}, "float32")
    assert merged_with({"batch_size": 1}, {"steps": 2}, "float32") == {"batch_size": 1, "steps": 2}
    with pytest.raises(FileNotFoundError):
        read_deepspeed(tmp_path / "none.json")
