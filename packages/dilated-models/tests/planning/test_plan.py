"""What a plan tells: times, what binds, the cheapest change that makes a job fit, pages."""

import dataclasses
import json
import math

import pytest
from dilated_models import LongNetConfig, plan
from dilated_models.longnet.encoder_decoder_config import EncoderDecoderConfig
from dilated_models.planning.changes import cheapest_change
from dilated_models.planning.hardware import AT_MOST, DATA_SHEETS, Hardware, Rates, hardware_named
from dilated_models.planning.job import Job
from dilated_models.planning.memory import memory_of
from dilated_models.planning.plan import plan_job, seconds_of

BASE = LongNetConfig(num_tokens=32_000)


def small_device(gigabytes: float, **changes) -> Hardware:
    return dataclasses.replace(hardware_named("h100-sxm"), memory_bytes=1e9 * gigabytes, **changes)


def test_what_binds():
    large = {"seq_len": 32_768, "dtype": "bfloat16", "batch_size": 1}
    assert plan(BASE, **large, hardware="a100-40gb").binding != "memory"
    large["seq_len"] *= 4
    assert not plan(BASE, **large, hardware="l4").fits
    assert plan(BASE, **large, hardware="l4").binding == "memory"
    assert plan(BASE, seq_len=2048, hardware="laptop").binding == "compute"
    tiny = LongNetConfig(num_tokens=64, d_model=32, nhead=2, num_decoder_layers=8)
    assert plan(tiny, seq_len=32).binding == "operations"
    decoding = plan(BASE, seq_len=32_768, mode="decoding", batch_size=8, dtype="bfloat16")
    assert decoding.binding in ("memory bandwidth", "operations")
    device = small_device(1e6, network_bytes_per_s=1e6)
    wide = LongNetConfig(num_tokens=256, d_model=2048, nhead=16)
    assert plan(wide, seq_len=128, batch_size=64, devices=64, hardware=device).binding == "network"


def test_times_add_up_and_data_sheets_bound_them():
    for name in DATA_SHEETS:
        found = plan(BASE, seq_len=4096, hardware=name)
        seconds, least = found.seconds, found.least_seconds
        assert least is not None
        assert 0 < least.total < seconds.total
        assert seconds.total == max(
            seconds.compute + seconds.memory_bandwidth + seconds.operations, seconds.network
        )
        assert found.flops / (1e12 * DATA_SHEETS[name].tflops["float32"]) <= least.total
        assert all(source.startswith("https://") for source in found.hardware.sources)
    assert hardware_named("h100-sxm", AT_MOST).operation_s == 0


def test_dense_attention_is_the_same_model_with_one_segment():
    dense = dataclasses.replace(BASE, segment_lengths=[8192], dilation_rates=[1])
    dilated, whole = (plan(model, seq_len=8192) for model in (BASE, dense))
    assert dilated.dense.attention_flops == whole.dense.attention_flops
    assert whole.dense.attention_flops == pytest.approx(
        sum(x.flops for x in whole.operations if x.kind == "attention")
    )
    assert dilated.dense.seconds > dilated.seconds.total


@pytest.mark.parametrize(
    ("gigabytes", "fields", "option"),
    [
        (24, {"seq_len": 65_536, "chunked_loss": False,
              "model": dataclasses.replace(BASE, activation_checkpointing=True)},
         "--whole-logits"),
        (80, {"seq_len": 262_144, "model": dataclasses.replace(BASE, num_tokens=256)},
         "--checkpoint-activations"),
        (16, {"seq_len": 8192, "batch_size": 8}, "--accumulation"),
        (3, {"seq_len": 128, "batch_size": 8, "devices": 8,
             "model": LongNetConfig(num_tokens=256, d_model=1024, nhead=16,
                                    dim_feedforward=4096)}, "--fsdp"),
    ],
)  # fmt: skip
def test_the_cheapest_change(gigabytes, fields, option):
    job = Job(**({"model": BASE, "dtype": "bfloat16", "on_gpu": True} | fields))
    device = small_device(gigabytes)
    found = plan_job(job, device)
    change = found.change
    assert not found.fits
    assert change is not None
    assert option in " ".join(change.what)
    changed = plan_job(change.job, device)
    assert changed.fits
    assert changed.memory.total == change.memory_bytes
    assert changed.seconds.total == pytest.approx(change.seconds)
    # No single change that fits has a shorter step.
    if len(change.what) == 1:
        recomputed = dataclasses.replace(job.model, activation_checkpointing=True)
        others = [{"chunked_loss": True}, {"accumulation": 8}, {"model": recomputed}]
        others += [{"fsdp": True}, {"cp": 8}] if job.devices == 8 else []
        for other in others:
            try:
                alternative = job.replace(**other)
            except ValueError:
                continue
            if memory_of(alternative).total <= device.memory_bytes:
                assert seconds_of(alternative, device).total >= change.seconds


def test_several_changes_then_more_devices():
    device = small_device(24)
    job = Job(model=BASE, seq_len=131_072, on_gpu=True, chunked_loss=False)
    several = cheapest_change(job, device)
    assert several is not None
    assert len(several.what) >= 2
    assert several.job.devices == 1
    longer = cheapest_change(job.replace(seq_len=2**20), device)
    assert longer is not None
    assert longer.job.devices > 1
    assert longer.job.cp == longer.job.devices
    assert "--devices" in longer.what[0]
    assert memory_of(longer.job).total <= device.memory_bytes
    # A model that no number of devices holds, since each rank has whole blocks at hand.
    assert cheapest_change(job.replace(seq_len=16), small_device(0.01)) is None


def test_errors_name_the_value_the_rule_and_the_fix():
    for fields, words in [
        ({"devices": 8, "cp": 3}, "cp is 3 and devices 8; cp must divide devices"),
        ({"devices": 8, "batch_size": 4}, "batch_size is 4; it must be a multiple of 8"),
        ({"fsdp": True}, "fsdp is given and devices is 1"),
        ({"dtype": "float16"}, "in training it must be 'float32'"),
        ({"mode": "decoding", "cp": 2, "devices": 2}, "a generation cache lies on one device"),
        ({"mode": "forward", "accumulation": 2}, "it is for training only, so leave it out"),
        ({"mode": "sleeping"}, "mode is 'sleeping'"),
        ({"hardware": "abacus"}, "hardware is 'abacus'"),
    ]:
        with pytest.raises(ValueError, match=words):
            plan(BASE, **({"seq_len": 64} | fields))
    with pytest.raises(ValueError, match="dtype is 'bfloat16' and hardware is 't4'"):
        plan(BASE, seq_len=64, dtype="bfloat16", hardware="t4")
    with pytest.raises(TypeError, match=r"seq_len is 6\.5"):
        plan(BASE, seq_len=6.5)
    with pytest.raises(TypeError, match="model is a int"):
        Job(model=5, seq_len=64)
    two = EncoderDecoderConfig(num_tokens=8, num_encoder_layers=1)
    with pytest.raises(ValueError, match="of a model of two sequences the generation of one is"):
        plan(two, seq_len=64)
    with pytest.raises(ValueError, match="memory_len is missing"):
        plan(two, seq_len=64, mode="decoding")
    with pytest.raises(ValueError, match="memory_len is 8 and model a LongNetConfig"):
        plan(BASE, seq_len=64, memory_len=8)
    bias = LongNetConfig(
        num_tokens=8, attention_kind="block_sparse_adaptive",
        attention_options={"gate_gradient": "bias"},
    )  # fmt: skip
    with pytest.raises(ValueError, match="such a model has no generation cache"):
        plan(bias, seq_len=64, mode="prefill")
    windowed = dataclasses.replace(BASE, local_window=8)
    with pytest.raises(ValueError, match="cp is 2 and the model has a local_window of 8"):
        plan(windowed, seq_len=64, cp=2, devices=2)


def test_a_length_that_xpos_cannot_have_is_noted():
    assert plan(BASE, seq_len=32_768).notes == ()
    found = plan(BASE, seq_len=2**20)
    assert "plain RoPE" in found.notes[0]
    assert "note: xPos" in str(found)
    assert plan(dataclasses.replace(BASE, positions="rotary"), seq_len=2**20).notes == ()


def test_plans_are_text_and_json():
    found = plan(BASE, seq_len=16_384, batch_size=2, devices=2, cp=2, hardware="l4")
    for words in ("binding: ", "memory of a rank", "time of a step", "dense attention", "cp 2"):
        assert words in str(found)
    content = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert content["memory"]["bytes"] == sum(content["memory"]["parts"].values())
    assert content["flops"] == sum(x["flops"] for x in content["operations"])


def test_measured_hardware_is_kept_in_a_file(tmp_path):
    device = small_device(8, products={"float32": Rates((1.0, 8.0), (1e9, 4e9))})
    path = tmp_path / "machine.json"
    path.write_text(device.to_json())
    assert hardware_named(str(path)) == device
    path.write_text("{}")
    with pytest.raises(ValueError, match="the file holds no hardware"):
        hardware_named(str(path))


def test_rates_between_sizes():
    rates = Rates((1.0, 100.0), (10.0, 30.0))
    assert [rates.at(x) for x in (0.1, 1, 10, 100, 1e6)] == [10, 10, 20, 30, 30]
    assert Rates.constant(5.0).at(math.pi) == 5


def test_the_folder_of_a_run(tmp_path):
    from dilated_models.longnet.saving import write_config

    write_config(tmp_path, {"model": BASE.to_dict(), "tokenizer": "bytes"})
    assert plan(tmp_path, seq_len=64).job.model == BASE
    assert plan(BASE.to_dict(), seq_len=64).job.model == BASE
