"""`dilated plan`: from options to a table, JSON and a page; errors name options."""

import json

import pytest
from dilated_models.cli.app import run


def output(capsys, *arguments: str) -> str:
    assert run(["plan", *arguments]) == 0
    return capsys.readouterr().out


def error(capsys, *arguments: str) -> str:
    assert run(["plan", *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    return captured.err


def test_a_preset(capsys):
    text = output(capsys)
    assert "85.5M parameters" in text
    assert "16 rows of 32,768 tokens in 16 parts, bfloat16, blocks recomputed" in text
    assert "binding: " in text
    spread = output(capsys, "--devices", "8", "--cp", "2", "--fsdp", "--hardware", "a100-80gb")
    assert "8 × a100-80gb, dp 4 × cp 2, FSDP" in spread
    assert "in 4 parts" in spread


def test_json_and_page(capsys, tmp_path):
    page = tmp_path / "plan.html"
    options = ["--preset", "tiny", "--hardware", "laptop", "--json", "--html", str(page)]
    content = json.loads(output(capsys, *options, "--layers", "5", "--heads", "8"))
    assert content["model"]["num_decoder_layers"] == 5
    assert content["job"]["dtype"] == "float32"
    assert content["fits"] is True
    text = page.read_text()
    assert text.count("<svg") == 1
    assert "binding: compute" in text
    assert content["sources"][0] in text
    # The page loads nothing, and runs nothing.
    assert not any(part in text for part in ("<script", "src=", "<link", "@import", "url(h"))


def test_what_makes_it_fit(capsys):
    text = output(
        capsys, "--num-tokens", "50000", "--hardware", "t4", "--no-checkpoint-activations"
    )
    assert "binding: memory: the job does not fit" in text
    assert "cheapest change that makes it fit: " in text


def test_branches_for_a_length(capsys):
    content = json.loads(
        output(capsys, "--seq-len", "1000000", "--segment-lengths", "auto", "--json")
    )
    assert max(content["model"]["segment_lengths"]) >= 1_000_000
    scaled = json.loads(output(capsys, "--seq-len", "65536", "--json"))  # as dilated train does
    assert scaled["model"]["segment_lengths"] == [4096, 8192, 16384, 32768, 65536]
    given = ["--segment-lengths", "64,128", "--dilation-rates", "1,2"]
    content = json.loads(output(capsys, *given, "--json"))
    assert content["model"]["segment_lengths"] == [64, 128]


def test_the_folder_of_a_run(capsys, tmp_path):
    from dilated_models import LongNetConfig
    from dilated_models.longnet.saving import write_config

    model = LongNetConfig(num_tokens=77, d_model=32, nhead=2)
    write_config(tmp_path, {"model": model.to_dict(), "tokenizer": "bytes"})
    content = json.loads(
        output(capsys, "--checkpoint", str(tmp_path), "--mode", "decoding", "--json")
    )
    assert content["model"]["num_tokens"] == 77
    assert content["job"]["seq_len"] == 32_768


def test_the_hardware_with_its_sources(capsys):
    text = output(capsys, "--list-hardware")
    assert "h100-sxm" in text
    assert text.count("https://") >= 12


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--devices", "8", "--cp", "3"], "--cp is 3 and --devices 8; --cp must divide"),
        (["--mode", "prefill", "--cp", "2", "--devices", "2"], "--cp is 2 and --mode is 'prefill'"),
        (["--batch-size", "3", "--devices", "2"], "--batch-size is 3; it must be a multiple of"),
        (["--hardware", "abacus"], "--hardware is 'abacus'"),
        (
            ["--hardware", "t4", "--dtype", "bfloat16"],
            "--dtype is 'bfloat16' and --hardware is 't4'",
        ),
        (["--preset", "huge"], "--preset is 'huge'"),
        (["--preset", "tiny", "--checkpoint", "x"], "--preset and --checkpoint are both given"),
        (["--segment-lengths", "auto", "--dilation-rates", "1"], "--dilation-rates is '1'"),
        (["--heads", "7"], "--heads is 7 and --d-model 768"),
        (["--html", "plan.txt"], "--html is 'plan.txt'; it must be a .html file"),
        (["--seq-len", "0"], "--seq-len is 0; it must be at least 1"),
        (["--hardware", "missing.json"], "missing.json"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_errors_name_the_option(capsys, arguments, words):
    assert words in error(capsys, *arguments)


def test_files_that_hold_no_hardware(capsys, tmp_path):
    from dilated_models.planning.hardware import hardware_named

    good = json.loads(hardware_named("l4").to_json())
    file = tmp_path / "machine.json"
    for change in ({"memory_bytes": -5}, {"memory_bytes": "many"}, {"memory": [[], []]}):
        file.write_text(json.dumps(good | change))
        assert "--hardware is" in error(capsys, "--hardware", str(file))
    assert "--batch-size is 0" in error(capsys, "--batch-size", "0")
