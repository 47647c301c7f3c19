"""Which tiles, warps and stages a launch takes, and which ones a user may give."""

import pytest
import torch
from dilated_core import DilatedPattern
from dilated_core.backends.contract import AttentionOptions
from dilated_kernels.fused import TritonBackend, attention, configs
from dilated_kernels.fused.tuning import Config, Tuning

AMPERE = Tuning((8, 0), "tf32")


@pytest.mark.parametrize(
    ("capability", "generation"),
    [
        *[((8, 0), "ampere"), ((8, 7), "ampere"), ((8, 6), "ada"), ((8, 9), "ada")],
        *[((12, 0), "ada"), ((12, 1), "ada"), ((11, 0), "blackwell")],
        *[((9, 0), "hopper"), ((10, 0), "blackwell"), ((10, 3), "blackwell")],
    ],
)
def test_generations(capability, generation):
    assert configs.generation(capability) == generation


@pytest.mark.parametrize("head_dim", [1, 16, 17, 48, 64, 96, 200, 256])
def test_every_call_has_a_configuration(head_dim):
    for capability in ((8, 0), (9, 0), (10, 0)):
        for kind in ("forward", "dq", "dk_dv"):
            for dtype, precision in (
                (torch.bfloat16, "tf32"),
                (torch.float32, "ieee"),
                (torch.float32, "tf32"),
            ):
                config = configs.tabled_config(kind, dtype, head_dim, capability, precision)
                assert config.block_m in (16, 32, 64, 128)
                assert config.block_n in (16, 32, 64, 128)


def test_tiles_are_no_longer_than_segments():
    own = AMPERE._replace(configs={"dq": Config(32, 128, 8, 3)})
    for kind, tuning, rows, tiles in [
        *(("forward", AMPERE, 10**6, (128, 64)), ("forward", AMPERE, 33, (64, 64))),
        *(("forward", AMPERE, 1, (16, 16)), ("forward", own, 10**6, (128, 64))),
        *(("dq", own, 10**6, (32, 128)), ("dq", own, 50, (32, 64))),
    ]:
        assert configs.choose_config(kind, torch.bfloat16, 64, tuning, rows)[:2] == tiles


@pytest.mark.parametrize("option", ["key_padding_mask", "dropout_p"])
def test_a_mask_or_dropout_takes_smaller_tiles(option):
    """With them the table's larger tiles would spill."""
    q = torch.zeros(1, 256, 2, 64, dtype=torch.bfloat16)
    tuning = Tuning((9, 0), "tf32")
    plain = attention.Options(False, 1.0, 0.0, 0, None, None)
    value = torch.zeros(1, 256, dtype=torch.bool) if option == "key_padding_mask" else 0.5
    tiles = []
    for options in (plain, plain._replace(**{option: value})):
        call = attention.make_call(q, q, q, DilatedPattern([256], [1]), options, tuning)
        out = attention.Accumulation(q, call.branches, is_read_unwritten=False)
        (launch,) = attention.forward_launches(call, out, torch.zeros(1, 256, 2))
        tiles.append((launch.constants["BLOCK_M"], launch.constants["BLOCK_N"]))
    without, with_option = tiles
    assert with_option[0] * with_option[1] < without[0] * without[1]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"delta": (16, 16, 4, 2)}, "configs has 'delta'; kernels with a config are 'forward'"),
        ({"dq": (24, 16, 4, 2)}, "block_m of 'dq' is 24; it must be at least 16 and a power of"),
        ({"dq": (16, 8, 4, 2)}, "block_n of 'dq' is 8; it must be at least 16 and a power of"),
        ({"dq": (16, 16, 4, 0)}, "num_stages of 'dq' is 0; it must be at least 1\\."),
    ],
)
def test_configs_that_no_kernel_can_have_are_refused(given, message):
    with pytest.raises(ValueError, match=message):
        TritonBackend(configs=given)


def test_a_backend_launches_with_its_own_configs(monkeypatch):
    launched = []
    monkeypatch.setattr(attention, "run", lambda launches, _: launched.extend(launches))
    q = torch.zeros(1, 64, 2, 16)
    mine = TritonBackend(configs={"dq": (32, 16, 2, 1)}, name="mine")
    mine.backward(q, q, q, q, q, q[..., 0], AttentionOptions(is_causal=False, scale=1.0))
    sizes = ("BLOCK_M", "BLOCK_N", "num_warps", "num_stages")
    found = [tuple(launch.constants.get(size) for size in sizes) for launch in launched]
    _, dq, dk_dv = found
    assert dq == (32, 16, 2, 1)
    assert dk_dv == configs.choose_config(
        "dk_dv", torch.float32, 16, attention.tuning_for(q, "row_major", {}), 64
    )
