"""The metrics of a run as TensorBoard reads them."""

from __future__ import annotations

import importlib.util
import math
from pathlib import Path
from typing import Any

TENSORBOARD_FOLDER = "tensorboard"


def check_tensorboard() -> None:
    """Refuse to go on without tensorboard.

    Raises:
        ModuleNotFoundError: If it is not installed.
    """
    if importlib.util.find_spec("tensorboard") is None:
        raise ModuleNotFoundError(
            "tensorboard is not installed; tensorboard=True needs it, so install it with: pip "
            "install 'dilated-models[tensorboard]'",
            name="tensorboard",
        )


class TensorBoard:
    """Writes the numbers and texts of metrics to `tensorboard/` in a run's folder.

    Args:
        folder: Of the run.
        after_step: TensorBoard hides what an earlier process wrote for later steps, which the run
            does again.

    Raises:
        ModuleNotFoundError: If tensorboard, the extra `tensorboard`, is not installed.
    """

    def __init__(self, folder: Path, *, after_step: int) -> None:
        check_tensorboard()
        from torch.utils.tensorboard import SummaryWriter

        self._writer: Any = SummaryWriter(folder / TENSORBOARD_FOLDER, purge_step=after_step + 1)

    def write(self, kind: str, step: int, values: dict[str, Any]) -> None:
        """Add each number as the scalar `kind/name`, and each text; lists and tables are left out.

        Contextwise losses are scalars: `sample/bits_per_byte_after_64`.
        """
        for name, value in values.items():
            if isinstance(value, str):
                # Indented: TensorBoard reads Markdown.
                text = "\n".join("    " + line for line in value.splitlines())
                self._writer.add_text(f"{kind}/{name}", text, step)
            elif isinstance(value, (int, float)) and math.isfinite(value):
                self._writer.add_scalar(f"{kind}/{name}", value, step)
        for loss in values.get("by_context", ()):
            name = f"{kind}/bits_per_byte_after_{loss['context']}"
            self._writer.add_scalar(name, loss["bits_per_byte"], step)

    def close(self) -> None:
        """Write what is still in memory."""
        self._writer.close()
