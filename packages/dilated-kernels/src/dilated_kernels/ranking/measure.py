"""Time every backend that can run here, after checking that its results are right."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from statistics import median
from typing import NamedTuple

import torch
from dilated_core import (
    AttentionInputs,
    DilatedPattern,
    available_backends,
    dilated_attention,
    recommended_dtype,
)
from dilated_core.backends.registry import get_backend, own_rank

from dilated_kernels.ranking.file import Case, MeasuredChoice, Timing
from dilated_kernels.ranking.measured import device_name, installed_versions

_PATTERN = DilatedPattern([2048, 4096, 8192], [1, 2, 4])
# Shorter segments, so that lengths that a CPU measures in seconds reach beyond them.
_CPU_PATTERN = DilatedPattern([256, 1024, 4096], [1, 4, 16])

# A fused kernel may round more often than eager, which computes in float32: it also rounds
# probabilities and their gradients to the inputs' dtype. A wrong index is off by orders of
# magnitude more.
_ALLOWED_OVER_EAGER = 4
_ALLOWED_ROUNDINGS = 4

_ROUNDS = 5
_FEWEST_ROUNDS = 3  # where a single run takes longer than a round


class _Sizes(NamedTuple):
    dtypes: tuple[torch.dtype, ...]
    head_dims: tuple[int, ...]
    seq_lens: tuple[int, ...]
    num_heads: int


def measure_backends(
    device: torch.device | str = "cpu",
    *,
    dtypes: Sequence[torch.dtype] | None = None,
    head_dims: Sequence[int] | None = None,
    seq_lens: Sequence[int] | None = None,
    num_heads: int | None = None,
    batch_size: int = 1,
    pattern: DilatedPattern | None = None,
    is_causal: bool = True,
    backends: Sequence[str] | None = None,
    seconds: float = 0.3,
    on_case: Callable[[Case], None] | None = None,
) -> MeasuredChoice:
    """Time forward, and forward and backward, of the backends that can run, in each size.

    Every backend first computes the case once, and out, dq, dk and dv are compared with those of
    `eager` in a wider dtype. A backend that is wrong or fails is not timed, and the result holds
    the reason. `eager` is in every case. Without arguments this takes less than a minute on a CPU.

    Args:
        device: Where to measure.
        dtypes: Of q, k and v; float32 and the half precisions that the device is good at if None.
        head_dims: D; 64, and 128 on accelerators, if None.
        seq_lens: S; 256, 1024 and 8192 on a CPU, 2048 to 32 768 elsewhere, if None.
        num_heads: H; 4 on a CPU, 8 elsewhere, if None.
        batch_size: B.
        pattern: Segments longer than S are clipped to it. If None, segments of 256, 1024 and 4096
            on a CPU and of 2048, 4096 and 8192 elsewhere, so that the longest S is beyond them.
        is_causal: Whether attention is causal.
        backends: Names; if None, those that `backend="auto"` may take.
        seconds: How long to repeat each of the two measurements, for three runs at least.
        on_case: Receives each case as soon as it is measured.

    Returns:
        For `use_measured_choice`.

    Raises:
        ValueError: If a list of sizes is empty, a size is not above 0 or given twice, a backend
            does not exist, or the device is not there.
    """
    preferred = recommended_dtype(device)  # refuses a device that is not there
    device = torch.device(device)
    usual = _usual_sizes(device, preferred)
    if pattern is None:
        pattern = _CPU_PATTERN if device.type == "cpu" else _PATTERN
    sizes = _Sizes(
        usual.dtypes if dtypes is None else tuple(dtypes),
        usual.head_dims if head_dims is None else tuple(head_dims),
        usual.seq_lens if seq_lens is None else tuple(seq_lens),
        usual.num_heads if num_heads is None else num_heads,
    )
    _check(sizes, batch_size)
    cases: list[Case] = []
    for dtype in sizes.dtypes:
        for head_dim in sizes.head_dims:
            for seq_len in sizes.seq_lens:
                inputs = AttentionInputs(device, dtype, sizes.num_heads, head_dim, seq_len=seq_len)
                names = _candidates(inputs, backends)
                trial = _Trial(inputs, batch_size, pattern, is_causal)
                timings = tuple(_timing(trial, name, seconds) for name in names)
                name = str(dtype).removeprefix("torch.")
                cases.append(Case(name, head_dim, seq_len, timings))
                if on_case is not None:
                    on_case(cases[-1])
    return MeasuredChoice(
        device.type,
        device_name(device),
        torch.get_num_threads(),
        datetime.now(UTC).date().isoformat(),
        installed_versions(),
        pattern,
        batch_size,
        sizes.num_heads,
        is_causal,
        tuple(cases),
    )


def _usual_sizes(device: torch.device, preferred: torch.dtype) -> _Sizes:
    if device.type == "cpu":
        return _Sizes((torch.float32, torch.bfloat16), (64,), (256, 1024, 8192), 4)
    half = (torch.bfloat16,) if preferred == torch.bfloat16 else ()
    return _Sizes((*half, torch.float16, torch.float32), (64, 128), (2048, 8192, 32768), 8)


def _check(sizes: _Sizes, batch_size: int) -> None:
    for name, values in (
        *(("head_dims", sizes.head_dims), ("seq_lens", sizes.seq_lens)),
        *(("num_heads", (sizes.num_heads,)), ("batch_size", (batch_size,))),
    ):
        if any(value < 1 for value in values):
            raise ValueError(f"{name} is {values}; sizes must be above 0.")
    lists = {"dtypes": sizes.dtypes, "head_dims": sizes.head_dims, "seq_lens": sizes.seq_lens}
    for name, values in lists.items():
        if not values or len(set(values)) != len(values):
            raise ValueError(f"{name} is {values}; give at least one value, and each once.")


def _candidates(inputs: AttentionInputs, names: Sequence[str] | None) -> list[str]:
    """The backends to time; eager last, because its failure means a broken device."""

    def wanted(name: str) -> bool:
        backend = get_backend(name)
        # Its own rank: a measurement in use must not exclude the backends that it refused.
        by_itself = names is not None or own_rank(backend, inputs)[0] >= 0
        return name != "eager" and by_itself and not backend.why_not(inputs)

    return [*filter(wanted, available_backends() if names is None else names), "eager"]


class _Trial:
    """The tensors of a case, their exact attention, and how far from it a result may be."""

    def __init__(
        self, inputs: AttentionInputs, batch_size: int, pattern: DilatedPattern, is_causal: bool
    ) -> None:
        assert inputs.seq_len is not None
        self.device = inputs.device
        self._pattern, self._is_causal = pattern, is_causal
        shape = (batch_size, inputs.seq_len, inputs.num_heads, inputs.head_dim)
        # On the CPU, whatever the default device: the same numbers everywhere.
        generator = torch.Generator("cpu").manual_seed(0)
        self._tensors = [
            torch.randn(shape, generator=generator, device="cpu").to(inputs.device, inputs.dtype)
            for _ in range(4)
        ]
        # Apple's GPUs have no float64.
        widest = torch.float32 if inputs.device.type == "mps" else torch.float64
        wider = widest if inputs.dtype.itemsize >= 4 else torch.float32
        self._exact = self._results("eager", [x.to(wider) for x in self._tensors])
        rounding = torch.finfo(inputs.dtype).eps
        self._allowed = [
            _ALLOWED_OVER_EAGER * error + _ALLOWED_ROUNDINGS * rounding
            for error in self._errors("eager")
        ]

    def wrong(self, name: str) -> str:
        """What is wrong with the results of a backend; "" if they are right."""
        wrong = [
            f"{what} is off by {error:.1e} of its norm, allowed {allowed:.1e}"
            for what, error, allowed in zip(
                ("out", "dq", "dk", "dv"), self._errors(name), self._allowed, strict=True
            )
            if not error <= allowed  # also for NaN
        ]
        return f"wrong results: {', '.join(wrong)}" if wrong else ""

    def forward(self, name: str) -> None:
        with torch.no_grad():
            self._attend(name, self._tensors[:3])

    def forward_backward(self, name: str) -> None:
        self._results(name, self._tensors)

    def _attend(self, name: str, qkv: Sequence[torch.Tensor]) -> torch.Tensor:
        q, k, v = qkv
        return dilated_attention(q, k, v, self._pattern, is_causal=self._is_causal, backend=name)

    def _results(self, name: str, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        *qkv, dout = tensors
        leaves = [x.detach().requires_grad_() for x in qkv]
        out = self._attend(name, leaves)
        return [out.detach(), *torch.autograd.grad(out, leaves, dout)]

    def _errors(self, name: str) -> list[float]:
        """‖result − exact‖ / ‖exact‖ of out, dq, dk and dv."""
        return [
            ((result.to(exact.dtype) - exact).norm() / exact.norm()).item()
            for result, exact in zip(self._results(name, self._tensors), self._exact, strict=True)
        ]


def _timing(trial: _Trial, name: str, seconds: float) -> Timing:
    try:
        if refused := trial.wrong(name):
            return Timing(name, None, None, refused)
        return Timing(
            name,
            _seconds(lambda: trial.forward(name), trial.device, seconds),
            _seconds(lambda: trial.forward_backward(name), trial.device, seconds),
            None,
        )
    except Exception as error:
        # Kernels and their compilers raise errors of every type. Here an error is a result, because
        # the user measures which backends work. If eager fails, the device itself is broken.
        if name == "eager":
            raise
        first_line = (str(error).splitlines() or [""])[0]
        return Timing(name, None, None, f"failed with {type(error).__name__}: {first_line}")


def _seconds(run: Callable[[], None], device: torch.device, seconds: float) -> float:
    """Median time of a run, from rounds of as many runs as fill `seconds` together."""

    def timed(count: int) -> float:
        _wait_for(device)
        start = time.perf_counter()
        for _ in range(count):
            run()
        _wait_for(device)
        return (time.perf_counter() - start) / count

    run()  # compiles
    count = max(1, int(seconds / _ROUNDS / timed(1)))
    rounds = _ROUNDS if count > 1 else _FEWEST_ROUNDS
    return median(timed(count) for _ in range(rounds))


def _wait_for(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
