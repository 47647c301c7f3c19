"""metrics.jsonl: whole lines, in order, none from beyond the checkpoint."""

import errno

import pytest
from dilated_models.training.metrics import MetricsFile, read_metrics


def test_metrics_after_the_checkpoint_are_dropped(tmp_path):
    with MetricsFile(tmp_path, after_step=0) as metrics:
        metrics.write("validation", 0, bits_per_byte=8.0)
        for step in range(1, 6):
            metrics.write("step", step, loss=1.0 / step, bits_per_byte=1.0)
        metrics.write("validation", 5, bits_per_byte=3.0)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "step", "st')  # cut short by a crash
    with MetricsFile(tmp_path, after_step=3) as metrics:
        assert metrics.validated == {0}
        metrics.write("step", 4, loss=9.0, bits_per_byte=1.0)
    records = read_metrics(tmp_path)
    assert [(r["kind"], r["step"]) for r in records] == [
        ("validation", 0),
        ("step", 1),
        ("step", 2),
        ("step", 3),
        ("step", 4),
    ]
    assert records[-1]["loss"] == 9.0


@pytest.mark.parametrize(
    "line",
    [
        "not json",
        "[]",
        '{"kind": "step"}',
        '{"kind": "step", "step": 2}',
        '{"kind": "validation", "step": 2, "bits_per_byte": null}',
        '{"step": 2}',
        "[" * 100_000,
        "\xff",
    ],
    ids=lambda line: line[:20],
)
def test_a_bad_line_is_named(tmp_path, line):
    good = '{"kind": "step", "step": 1, "bits_per_byte": 8.0}\n'
    (tmp_path / "metrics.jsonl").write_bytes(f"{good}{line}\n{good}".encode("latin-1"))
    with pytest.raises(ValueError, match=r"line 2 of '.*metrics\.jsonl' is no record of a run: "):
        read_metrics(tmp_path)


def test_a_full_disk_leaves_whole_lines(tmp_path, monkeypatch):
    with MetricsFile(tmp_path, after_step=0) as metrics:
        metrics.write("other", 0)
        real = metrics._file

        class Full:
            """Takes three bytes, then none."""

            room = 3

            def __getattr__(self, name: str) -> object:
                return getattr(real, name)

            def write(self, line: bytes) -> int:
                if not self.room:
                    raise OSError(errno.ENOSPC, "No space left on device")
                self.room = 0
                return real.write(line[:3])

        monkeypatch.setattr(metrics, "_file", Full())
        with pytest.raises(OSError, match=r"No space left on device: '.*metrics\.jsonl'"):
            metrics.write("other", 1)
    assert (tmp_path / "metrics.jsonl").read_text() == '{"kind": "other", "step": 0}\n'


def test_what_a_resumed_run_keeps(tmp_path):
    """Nothing of the steps that it does again, but for measures, which hold there too."""
    with MetricsFile(tmp_path, after_step=0) as metrics:
        for step in range(1, 7):
            metrics.write("step", step, bits_per_byte=1.0)
        for step in (2, 4, 6):
            metrics.write("sample", step, sample="text")
        metrics.write("out_of_memory", 5, accumulation=2)
    with MetricsFile(tmp_path, after_step=4) as metrics:
        assert metrics.sampled == {2, 4}
    records = [(r["kind"], r["step"]) for r in read_metrics(tmp_path) if r["kind"] != "step"]
    assert records == [("sample", 2), ("sample", 4), ("out_of_memory", 5)]
