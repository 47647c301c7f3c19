from tools.soak_table import soak


def row(kind, faults, same=True, named=True):
    events = [
        {"fault": fault, "rank": 1, "step": 3, "seconds_to_end": 2.0}
        | ({"named": named} if fault == "hang" else {})
        for fault in faults
    ]
    shared = {"processes": 2, "num_steps": 60, "seconds": 90.0, "same_losses": True}
    return {"kind": kind, "events": events, "same_weights": same} | shared


def test_a_run_that_lost_its_bits_and_a_hang_nobody_named_are_counted():
    rows = [
        row("DDP", ["kill", "hang", "kill"]),
        row("FSDP2", ["stop", "disk full", "hang"], same=False, named=False),
    ]
    text = "\n".join(soak(rows))
    assert "| DDP | 1 | 2 | 1 | 0 | 0 | 1 |" in text
    assert "| FSDP2 | 1 | 0 | 1 | 1 | 1 | 0 |" in text
    assert "1 of 2 runs" in text
    assert "1 of 2 hanging ranks were named" in text
    assert "3 minutes, with 6 faults" in text
