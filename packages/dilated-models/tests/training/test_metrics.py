"""metrics.jsonl: whole lines, in order, none from beyond the checkpoint."""

from dilated_models.training.metrics import MetricsFile, read_metrics


def test_metrics_after_the_checkpoint_are_dropped(tmp_path):
    with MetricsFile(tmp_path, after_step=0) as metrics:
        metrics.write("validation", 0, bits_per_byte=8.0)
        for step in range(1, 6):
            metrics.write("step", step, loss=1.0 / step)
        metrics.write("validation", 5, bits_per_byte=3.0)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "step", "st')  # cut short by a crash
    with MetricsFile(tmp_path, after_step=3) as metrics:
        assert metrics.validated == {0}
        metrics.write("step", 4, loss=9.0)
    records = read_metrics(tmp_path)
    assert [(r["kind"], r["step"]) for r in records] == [
        ("validation", 0),
        ("step", 1),
        ("step", 2),
        ("step", 3),
        ("step", 4),
    ]
    assert records[-1]["loss"] == 9.0
