"""What this machine can do: its rates, measured in about ten seconds."""

from __future__ import annotations

import platform
import time
from collections.abc import Callable

import torch
from dilated_core import DilatedPattern, dilated_attention
from torch import nn
from torch.nn import functional

from dilated_models.longnet.size import available_bytes
from dilated_models.planning.hardware import Hardware, Rates

_PRODUCT_SIZES = (32, 96, 256, 768)
_SEGMENT_ROWS = (64, 256, 1024, 4096)
_WORKING_SETS = (2**16, 2**20, 2**22, 2**24, 2**27)
_TENSORS = 12  # of a working set: pairs and their sums
_HEAD_DIM, _NARROW_HEAD_DIM = 64, 16
_ROUNDS = 5


def calibrate(
    device: torch.device | str = "cpu",
    *,
    dtypes: tuple[str, ...] = ("float32",),
    clock: Callable[[], float] = time.perf_counter,
) -> Hardware:
    """Measure the rates of a device of this machine.

    Args:
        device: Where to measure.
        dtypes: Dtypes of products and attention.
        clock: Seconds. `time.process_time` with one thread does not count what other processes
            take, but memory bandwidth is still shared.
    """
    where = torch.device(device)
    timer = _Timer(where, clock)
    products: dict[str, Rates] = {}
    forward: dict[str, Rates] = {}
    backward: dict[str, Rates] = {}
    width = 0.0
    for name in dtypes:
        dtype: torch.dtype = getattr(torch, name)
        products[name] = _rates(_PRODUCT_SIZES, lambda n, x=dtype: timer.product(n, x))
        pairs = [timer.attention(rows, _HEAD_DIM, dtype) for rows in _SEGMENT_ROWS]
        if name == "float32":
            width = _extra_width(timer, dtype)
        scale = (_HEAD_DIM + width) / _HEAD_DIM
        sizes = tuple(map(float, _SEGMENT_ROWS))
        forward[name] = Rates(sizes, tuple(scale * rate for rate, _ in pairs))
        backward[name] = Rates(sizes, tuple(scale * rate for _, rate in pairs))
    return Hardware(
        name=f"{_processor(where)}, {torch.get_num_threads()} threads",
        memory_bytes=float(available_bytes(where) or 0),
        products=products,
        attention=forward,
        attention_backward=backward,
        attention_width=width,
        memory=_rates(_WORKING_SETS, timer.sums),
        number_s=timer.numbers(),
        operation_s=timer.operation(),
        sources=("measured by dilated_models.planning.calibration",),
    )


def _rates(sizes: tuple[int, ...], measure: Callable[[int], float]) -> Rates:
    return Rates(tuple(map(float, sizes)), tuple(map(measure, sizes)))


def _extra_width(timer: _Timer, dtype: torch.dtype) -> float:
    """How many channels a pair's exponential function costs as much as.

    Seconds of a pair are a·(D + width), so two values of D tell the width.
    """
    rows = 1024
    seconds = [
        4 * dim / timer.attention(rows, dim, dtype)[0] for dim in (_NARROW_HEAD_DIM, _HEAD_DIM)
    ]
    slope = (seconds[1] - seconds[0]) / (_HEAD_DIM - _NARROW_HEAD_DIM)
    return max(0.0, seconds[1] / slope - _HEAD_DIM) if slope > 0 else float(_HEAD_DIM)


class _Timer:
    """Times operations on a device."""

    def __init__(self, device: torch.device, clock: Callable[[], float]) -> None:
        self._device, self._clock = device, clock
        self._generator = torch.Generator().manual_seed(0)

    def seconds(self, run: Callable[[], object], *, at_least_s: float = 0.02) -> float:
        """Time of one run in the quickest of some rounds: other processes only add time."""
        run()
        runs, took = 1, self._took(run, 1)
        while took < at_least_s:
            runs = max(runs + 1, min(100 * runs, round(1.2 * runs * at_least_s / max(took, 1e-9))))
            took = self._took(run, runs)
        return min(self._took(run, runs) for _ in range(_ROUNDS)) / runs

    def _took(self, run: Callable[[], object], runs: int) -> float:
        self._wait()
        begin = self._clock()
        for _ in range(runs):
            run()
        self._wait()
        return self._clock() - begin

    def _wait(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)

    def _random(self, *shape: int, dtype: torch.dtype) -> torch.Tensor:
        return torch.randn(shape, generator=self._generator).to(self._device, dtype)

    def product(self, size: int, dtype: torch.dtype) -> float:
        """FLOP/s of products whose smallest side is `size`: a linear layer, as models use it."""
        tokens, out = 1024, 4 * size
        x, weight = (self._random(n, size, dtype=dtype) for n in (tokens, out))
        bias = self._random(out, dtype=dtype)
        seconds = self.seconds(lambda: torch.nn.functional.linear(x, weight, bias))
        return 2 * tokens * size * out / seconds

    def attention(self, rows: int, head_dim: int, dtype: torch.dtype) -> tuple[float, float]:
        """FLOP/s of causal attention within segments of `rows`, forward and backward."""
        seq_len, heads = max(rows, 1024), 4
        shape = (1, seq_len, heads, head_dim)
        q, k, v, dout = (self._random(*shape, dtype=dtype) for _ in range(4))
        pattern = DilatedPattern([rows], [1])

        def attend() -> torch.Tensor:
            return dilated_attention(q, k, v, pattern, is_causal=True)

        flops = [
            pattern.flops(seq_len, heads, head_dim, is_causal=True, backward=backward)
            for backward in (False, True)
        ]
        forward = self.seconds(attend)
        q, k, v = (x.requires_grad_() for x in (q, k, v))
        both = self.seconds(lambda: torch.autograd.grad(attend(), (q, k, v), dout))
        return flops[0] / forward, flops[1] / max(both - forward, 0.1 * both)

    def sums(self, num_bytes: int) -> float:
        """Bytes/s that sums of tensors of so many bytes together read and write."""
        size = num_bytes // (4 * _TENSORS)
        pairs = [self._random(2, size, dtype=torch.float32) for _ in range(_TENSORS // 3)]

        def add() -> list[torch.Tensor]:
            return [x + y for x, y in pairs]

        return 12 * size * len(pairs) / self.seconds(add)

    def numbers(self) -> dict[str, float]:
        """Seconds of a number in functions that compute more than they move."""
        x = self._random(1024, 256, dtype=torch.float32)
        plain = self.seconds(lambda: x + x)
        functions: dict[str, Callable[[], object]] = {
            "gelu": lambda: functional.gelu(x),
            "dropout": lambda: functional.dropout(x, 0.5),
            "softmax": lambda: functional.log_softmax(x, -1),
        }
        return {k: max(0.0, self.seconds(f) - plain) / x.numel() for k, f in functions.items()}

    def operation(self) -> float:
        """Seconds of an operation of a module on few numbers, forward or backward."""
        x = torch.zeros(1, 8, device=self._device)
        linear, norm = nn.Linear(8, 8).to(self._device), nn.LayerNorm(8).to(self._device)
        parameters = [*linear.parameters(), *norm.parameters()]

        def step() -> object:
            y = x
            for _ in range(4):
                y = y + norm(linear(y)).relu()
            return torch.autograd.grad(y.sum(), parameters)

        # A turn: view, product, LayerNorm, activation, sum; backward as many again, and sums of the
        # gradients of x and of four parameters.
        return self.seconds(step) / (4 * 16)


def _processor(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return platform.processor() or platform.machine()
