"""What devices can do: figures of data sheets with their sources, and of measured machines."""

from __future__ import annotations

import bisect
import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from dilated_core.checks import check_choice, check_number


class Rates(NamedTuple):
    """A rate that depends on a size: measured at some sizes, interpolated over log(size) between.

    Attributes:
        sizes: Ascending.
        per_second: The rate at each size; that of the first and last one holds beyond them.

    Example:
        >>> Rates((1, 100), (10.0, 30.0)).at(10)
        20.0
    """

    sizes: tuple[float, ...]
    per_second: tuple[float, ...]

    @classmethod
    def constant(cls, per_second: float) -> Rates:
        """The same rate for every size."""
        return cls((1.0,), (per_second,))

    def at(self, size: float) -> float:
        """The rate at a size."""
        after = bisect.bisect_right(self.sizes, size)
        if after == 0:
            return self.per_second[0]
        if after == len(self.sizes):
            return self.per_second[-1]
        low, high = self.sizes[after - 1], self.sizes[after]
        share = math.log(size / low) / math.log(high / low)
        return self.per_second[after - 1] * (1 - share) + self.per_second[after] * share


@dataclass(frozen=True, kw_only=True, slots=True)
class Hardware:
    """A device and its connections to others.

    Attributes:
        name: Such as `"h100-sxm"`.
        memory_bytes: Memory of a device.
        products: By dtype, FLOP/s of matrix products, by the smallest of their three sizes. A dtype
            that is missing does not run there.
        attention: By dtype, FLOP/s of attention in forward, by rows of a segment.
        attention_backward: The same for the backward pass.
        attention_width: A pair of query and key costs as much time as products over this many
            channels more than a head has: its exponential function.
        memory: Bytes/s that elementwise operations read and write, by the bytes that are in use.
        number_s: Further time of a number in operations that compute more than they move: `"gelu"`,
            `"dropout"`, `"softmax"`.
        operation_s: Time of an operation on an empty tensor.
        devices_per_node: Devices with fast connections to one another.
        node_bytes_per_s: What a device sends to others in its node, in one direction.
        network_bytes_per_s: What a device sends to other nodes, in one direction.
        sources: Addresses of the data sheets, or how it was measured.
    """

    name: str
    memory_bytes: float
    products: Mapping[str, Rates]
    attention: Mapping[str, Rates]
    attention_backward: Mapping[str, Rates]
    attention_width: float = 0.0
    memory: Rates
    number_s: Mapping[str, float] = field(default_factory=dict[str, float])
    operation_s: float
    devices_per_node: int = 1
    node_bytes_per_s: float = math.inf
    network_bytes_per_s: float = math.inf
    sources: tuple[str, ...] = field(default=())

    def to_json(self) -> str:
        """All of it as a JSON object."""
        return json.dumps(dataclasses.asdict(self), indent=1)

    @classmethod
    def from_json(cls, text: str) -> Hardware:
        """Inverse of `to_json`.

        Raises:
            ValueError: If the text is something else.
        """
        try:
            fields: dict[str, Any] = json.loads(text)
            for name in ("products", "attention", "attention_backward"):
                fields[name] = {key: _rates(pair) for key, pair in fields[name].items()}
            fields["memory"] = _rates(fields["memory"])
            fields["sources"] = tuple(fields["sources"])
            for name in ("memory_bytes", "operation_s"):
                check_number(name, fields[name], at_least=0)
            return cls(**fields)
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise ValueError(
                f"the file holds no hardware ({type(error).__name__}: {error}); it must be a file "
                f"that dilated plan --calibrate wrote."
            ) from error


def _rates(pair: Sequence[Sequence[float]]) -> Rates:
    sizes, per_second = pair
    for number in (*sizes, *per_second):
        check_number("a rate", number, above=0)
    if not sizes or len(sizes) != len(per_second):
        raise ValueError(f"there are {len(sizes)} sizes and {len(per_second)} rates")
    return Rates(tuple(sizes), tuple(per_second))


class Shares(NamedTuple):
    """Which part of the figures of a data sheet programs reach: assumptions, not measurements.

    Attributes:
        products: Of FLOP/s, in matrix products. Whole training steps of large models reach 0.47 on
            an H100 (NVIDIA's Megatron-Core), which includes all other operations.
        attention: Of FLOP/s, in attention, forward and backward. FlashAttention-2 and 3 report 0.35
            to 0.75 on an H100 (arXiv 2407.08608).
        memory: Of bytes/s.
        network: Of bytes/s. NCCL's point-to-point test on NVLink reaches 0.83 (NVIDIA/nccl#1264).
    """

    products: float = 0.65
    attention: float = 0.4
    memory: float = 0.8
    network: float = 0.75


EXPECTED = Shares()
AT_MOST = Shares(1.0, 1.0, 1.0, 1.0)
_LAUNCH_S = 5e-6  # of a CUDA kernel, about; PyTorch without a compiler starts one an operation


class DataSheet(NamedTuple):
    """Figures of a data sheet: dense, without structured sparsity; 10^9 bytes in a GB.

    Attributes:
        memory_gb: Memory.
        tflops: 10^12 FLOP/s by dtype. float32 is that of PyTorch's default, without TF32.
        memory_gb_per_s: Memory bandwidth.
        per_node: Devices with fast connections.
        node_gb_per_s: Of these connections, of a device, in one direction.
        network_gb_per_s: Of a device's share of the network, in one direction.
        sources: Addresses.
    """

    memory_gb: float
    tflops: Mapping[str, float]
    memory_gb_per_s: float
    per_node: int
    node_gb_per_s: float
    network_gb_per_s: float
    sources: tuple[str, ...]

    def hardware(self, name: str, shares: Shares = EXPECTED) -> Hardware:
        """A device that reaches these shares of the figures."""
        flops = {dtype: 1e12 * tflops for dtype, tflops in self.tflops.items()}
        attention = {k: Rates.constant(shares.attention * v) for k, v in flops.items()}
        return Hardware(
            name=name,
            memory_bytes=1e9 * self.memory_gb,
            products={k: Rates.constant(shares.products * v) for k, v in flops.items()},
            attention=attention,
            attention_backward=attention,
            memory=Rates.constant(1e9 * shares.memory * self.memory_gb_per_s),
            operation_s=_LAUNCH_S if shares != AT_MOST else 0.0,
            devices_per_node=self.per_node,
            node_bytes_per_s=1e9 * shares.network * self.node_gb_per_s,
            network_bytes_per_s=1e9 * shares.network * self.network_gb_per_s,
            sources=self.sources,
        )


_A100 = (
    "https://www.nvidia.com/content/dam/en-zz/Solutions/Data-Center/a100/pdf/"
    "nvidia-a100-datasheet-us-nvidia-1758950-r4-web.pdf"
)
_ADA = (
    "https://images.nvidia.com/aem-dam/Solutions/Data-Center/l4/"
    "nvidia-ada-gpu-architecture-whitepaper-v2.1.pdf"
)
_DGX_A100 = "https://developer.nvidia.com/blog/defining-ai-innovation-with-dgx-a100"
_DGX = (
    "https://docs.nvidia.com/dgx-basepod/"
    "reference-architecture-infrastructure-foundation-enterprise-ai/latest/core-components.html"
)
_H100 = "https://www.nvidia.com/en-us/data-center/h100/"
_GB_PER_S_OF_10_GBIT = 1.25

DATA_SHEETS: dict[str, DataSheet] = {
    "laptop": DataSheet(
        # 4 cores of 2.9 GHz that multiply and add 2 x 8 numbers a cycle; 2 channels of DDR4-2400.
        16, {"float32": 0.371}, 38.4, 1, math.inf, _GB_PER_S_OF_10_GBIT,
        ("https://en.wikichip.org/wiki/intel/core_i7/i7-7820hq",),
    ),
    "t4": DataSheet(
        16, {"float32": 8.1, "float16": 65}, 320, 1, 16, _GB_PER_S_OF_10_GBIT,
        ("https://www.nvidia.com/en-us/data-center/tesla-t4/",),
    ),
    "v100-sxm2": DataSheet(
        32, {"float32": 15.7, "float16": 125}, 900, 8, 150, 6.25,  # 4 ports of 100 Gbit/s a node
        ("https://images.nvidia.com/content/technologies/volta/pdf/"
         "volta-v100-datasheet-update-us-1165301-r5.pdf",),
    ),
    "l4": DataSheet(
        24, {"float32": 30.3, "bfloat16": 121, "float16": 121}, 300, 1, 32, _GB_PER_S_OF_10_GBIT,
        ("https://www.nvidia.com/en-us/data-center/l4/", _ADA),
    ),
    "rtx-4090": DataSheet(
        24, {"float32": 82.6, "bfloat16": 165.2, "float16": 165.2}, 1008, 1, 32,
        _GB_PER_S_OF_10_GBIT, (_ADA,),
    ),
    "a100-40gb": DataSheet(
        40, {"float32": 19.5, "bfloat16": 312, "float16": 312}, 1555, 8, 300, 25,
        (_A100, _DGX_A100),
    ),
    "a100-80gb": DataSheet(
        80, {"float32": 19.5, "bfloat16": 312, "float16": 312}, 2039, 8, 300, 25,
        (_A100, _DGX_A100),
    ),
    "h100-pcie": DataSheet(
        80, {"float32": 51, "bfloat16": 756, "float16": 756}, 2000, 2, 300, 50, (_H100, _DGX),
    ),
    "h100-sxm": DataSheet(
        80, {"float32": 67, "bfloat16": 989, "float16": 989}, 3350, 8, 450, 50, (_H100, _DGX),
    ),
    "h200": DataSheet(
        141, {"float32": 67, "bfloat16": 989, "float16": 989}, 4800, 8, 450, 50,
        ("https://www.nvidia.com/en-us/data-center/h200/", _DGX),
    ),
    "b200": DataSheet(
        180, {"float32": 80, "bfloat16": 2250, "float16": 2250}, 8000, 8, 900, 50,
        ("https://www.nvidia.com/en-us/data-center/dgx-b200/", _DGX),
    ),
    "mi300x": DataSheet(
        192, {"float32": 163.4, "bfloat16": 1307.4, "float16": 1307.4}, 5300, 8, 448, 50,
        ("https://www.amd.com/en/products/accelerators/instinct/mi300/mi300x.html",),
    ),
}  # fmt: skip


def hardware_named(name: str, shares: Shares = EXPECTED) -> Hardware:
    """The device of a data sheet, or of a file that `dilated plan --calibrate` wrote.

    Args:
        name: A name in `DATA_SHEETS`, or the path of a `.json` file.
        shares: Which part of the figures of a data sheet it reaches.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the name is unknown, or the file holds something else.
    """
    if name.endswith(".json"):
        try:
            return Hardware.from_json(Path(name).read_text("utf-8"))
        except ValueError as error:
            raise ValueError(f"hardware is {name!r}: {error}") from error
    check_choice("hardware", name, tuple(DATA_SHEETS))
    return DATA_SHEETS[name].hardware(name, shares)
