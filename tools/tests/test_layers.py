"""The import contracts of pyproject.toml, tried on trees that keep and break them."""

import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from tools.packages import ROOT, find_packages

CONFIG = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
MEMBERS = ["dilated_core", "dilated_models", "dilated_kernels", "dilated_ring", "dilated_sparse"]
GOOD = {
    "dilated_core/__init__.py": "from dilated_core.reference import oracle",
    "dilated_core/atomic_write.py": "",
    "dilated_core/attention.py": "import dilated_core.dispatch",
    "dilated_core/cross_entropy.py": "import dilated_core.dispatch",
    "dilated_core/dispatch.py": "import dilated_core.transforms",
    "dilated_core/flops.py": "import dilated_core.ops",
    "dilated_core/transforms.py": "import dilated_core.ops",
    "dilated_core/backends/__init__.py": "import dilated_core.merge",
    "dilated_core/checks.py": "",
    "dilated_core/decoding/__init__.py": "import dilated_core.strips",
    "dilated_core/inputs.py": "import dilated_core.checks",
    "dilated_core/inspection/__init__.py": "import dilated_core.inputs",
    "dilated_core/merge.py": "",
    "dilated_core/dropout.py": "",
    "dilated_core/modules/__init__.py": "import dilated_core.attention",
    "dilated_core/ops.py": "import dilated_core.strips",
    "dilated_core/pattern/__init__.py": "import dilated_core.checks",
    "dilated_core/positions/__init__.py": "",
    "dilated_core/reference.py": "import dilated_core.pattern\noracle = 1",
    "dilated_core/streaming/__init__.py": "import dilated_core.attention",
    "dilated_core/strips/__init__.py": "import dilated_core.backends",
    "dilated_core/testing/__init__.py": "",
    "dilated_core/testing/cases.py": "import dilated_core.reference, dilated_core.testing.budget",
    "dilated_core/testing/budget.py": "",
    "dilated_kernels/__init__.py": "import dilated_core, dilated_kernels.ranking",
    "dilated_kernels/availability.py": "",
    "dilated_kernels/flex/__init__.py": "import dilated_kernels.availability",
    "dilated_kernels/fused/__init__.py": "import dilated_kernels.ranking",
    "dilated_kernels/ranking/__init__.py": "import dilated_kernels.availability",
    "dilated_kernels/vendors/__init__.py": "import dilated_kernels.ranking",
    "dilated_ring/__init__.py": "import dilated_core",
    "dilated_ring/arguments.py": "import dilated_ring.execution",
    "dilated_ring/attention.py": "import dilated_ring.over_ranks",
    "dilated_ring/block_attention.py": "import dilated_ring.over_ranks",
    "dilated_ring/over_ranks.py": "import dilated_ring.arguments",
    "dilated_ring/execution/__init__.py": "import dilated_ring.sharding, dilated_ring.plan",
    "dilated_ring/gradients/__init__.py": "",
    "dilated_ring/layout.py": "",
    "dilated_ring/modules/__init__.py": "import dilated_ring.attention",
    "dilated_ring/plan/__init__.py": "import dilated_ring.layout",
    "dilated_ring/sharding/__init__.py": "import dilated_ring.transport",
    "dilated_ring/training/__init__.py": "import dilated_ring.attention",
    "dilated_ring/transport/__init__.py": "import dilated_ring.layout",
    "dilated_ring/uncompiled.py": "",
    "dilated_sparse/__init__.py": "import dilated_core",
    "dilated_sparse/adaptive/__init__.py": "import dilated_sparse.modules",
    "dilated_sparse/arguments.py": "",
    "dilated_sparse/attention.py": "import dilated_sparse.ops",
    "dilated_sparse/execution/__init__.py": "import dilated_sparse.pattern",
    "dilated_sparse/factory.py": "import dilated_sparse.adaptive, dilated_sparse.presets",
    "dilated_sparse/modules/__init__.py": "import dilated_sparse.attention",
    "dilated_sparse/ops.py": "import dilated_sparse.execution, dilated_sparse.operators",
    "dilated_sparse/operators.py": "",
    "dilated_sparse/order/__init__.py": "",
    "dilated_sparse/pattern/__init__.py": "",
    "dilated_sparse/presets/__init__.py": "import dilated_sparse.modules, dilated_sparse.windowed",
    "dilated_sparse/windowed/__init__.py": "import dilated_sparse.operators",
    "dilated_models/__init__.py": "import dilated_core\ndef f():\n    import dilated_ring",
    "dilated_models/__main__.py": "import dilated_models.cli",
    "dilated_models/train.py": "import dilated_models.cli",
    "dilated_models/checkpoints/__init__.py": "import dilated_models.longnet, dilated_models.slide",
    "dilated_models/cli/__init__.py": "import dilated_models.training",
    "dilated_models/attention_kinds.py": "",
    "dilated_models/config.py": "import dilated_models.attention_kinds",
    "dilated_models/drawing/__init__.py": "import dilated_models.longnet, dilated_models.text",
    "dilated_models/encoder/__init__.py": "import dilated_models.layers",
    "dilated_models/huggingface/__init__.py": "import dilated_models.longnet",
    "dilated_models/layers/__init__.py": "import dilated_models.config",
    "dilated_models/longnet/__init__.py": "import dilated_models.layers, dilated_models.text",
    "dilated_models/planning/__init__.py": "import dilated_models.longnet",
    "dilated_models/slide/__init__.py": "import dilated_models.encoder",
    "dilated_models/pathology/__init__.py": "import dilated_models.checkpoints",
    "dilated_models/slide_encoder.py": "import dilated_models.checkpoints",
    "dilated_models/text/__init__.py": "",
    "dilated_models/training/__init__.py": "import dilated_models.longnet, dilated_models.text",
}


def run_contracts(folder: Path, files: dict[str, str]) -> subprocess.CompletedProcess[str]:
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    listed = tomllib.loads(CONFIG)["tool"]["importlinter"]["root_packages"]
    written = str(listed).replace("'", '"')
    assert written in CONFIG
    (folder / "pyproject.toml").write_text(CONFIG.replace(written, str(MEMBERS)))
    command = "from importlinter.cli import lint_imports_command as run; run()"
    return subprocess.run(
        [sys.executable, "-c", command, "--no-cache", "--no-logo"],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(folder)},
        capture_output=True,
        text=True,
    )


def test_the_intended_imports_are_allowed(tmp_path: Path) -> None:
    result = run_contracts(tmp_path, GOOD)
    assert result.returncode == 0, result.stdout


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("dilated_core/merge.py", "import dilated_models"),
        ("dilated_core/merge.py", "import dilated_kernels"),
        ("dilated_ring/plan/__init__.py", "import dilated_kernels"),
        ("dilated_ring/plan/__init__.py", "import dilated_ring.transport"),
        ("dilated_ring/layout.py", "import dilated_ring.plan"),
        ("dilated_ring/gradients/__init__.py", "import dilated_ring.layout"),
        ("dilated_ring/execution/__init__.py", "import dilated_ring.attention"),
        ("dilated_ring/attention.py", "import dilated_ring.modules"),
        ("dilated_ring/unlisted.py", ""),
        ("dilated_sparse/ops.py", "def f():\n    import dilated_ring"),
        ("dilated_sparse/pattern/__init__.py", "import dilated_sparse.execution"),
        ("dilated_sparse/execution/__init__.py", "import dilated_sparse.ops"),
        ("dilated_sparse/ops.py", "import dilated_sparse.attention"),
        ("dilated_sparse/attention.py", "import dilated_sparse.modules"),
        ("dilated_sparse/attention.py", "import dilated_sparse.windowed"),
        ("dilated_sparse/modules/__init__.py", "import dilated_sparse.presets"),
        ("dilated_sparse/modules/__init__.py", "import dilated_sparse.adaptive"),
        ("dilated_sparse/presets/__init__.py", "import dilated_sparse.adaptive"),
        ("dilated_sparse/operators.py", "import dilated_sparse.pattern"),
        ("dilated_sparse/unlisted.py", ""),
        ("dilated_kernels/fused/plan.py", "import dilated_models"),
        ("dilated_kernels/fused/__init__.py", "import dilated_kernels.vendors"),
        ("dilated_kernels/vendors/__init__.py", "import dilated_kernels.flex"),
        ("dilated_kernels/ranking/__init__.py", "import dilated_kernels.fused"),
        ("dilated_kernels/availability.py", "import dilated_kernels.ranking"),
        ("dilated_kernels/unlisted.py", ""),
        ("dilated_core/strips/__init__.py", "import dilated_core.reference"),
        ("dilated_core/strips/__init__.py", "import dilated_core.ops"),
        ("dilated_core/strips/__init__.py", "import dilated_core.decoding"),
        ("dilated_core/merge.py", "import dilated_core.pattern"),
        ("dilated_core/streaming/__init__.py", "import dilated_core.modules"),
        ("dilated_core/unlisted.py", ""),
        ("dilated_models/layers/__init__.py", "import dilated_models.longnet"),
        ("dilated_models/layers/__init__.py", "import dilated_models.text"),
        ("dilated_models/encoder/__init__.py", "import dilated_models.slide"),
        ("dilated_models/slide/__init__.py", "import dilated_models.longnet"),
        ("dilated_models/slide/__init__.py", "import dilated_models.checkpoints"),
        ("dilated_models/checkpoints/__init__.py", "import dilated_models.slide_encoder"),
        ("dilated_models/pathology/__init__.py", "import dilated_models.drawing"),
        ("dilated_models/longnet/__init__.py", "import dilated_models.training"),
        ("dilated_models/training/__init__.py", "import dilated_models.cli"),
        ("dilated_models/training/__init__.py", "import dilated_models.drawing"),
        ("dilated_models/drawing/__init__.py", "import dilated_models.training"),
        ("dilated_models/unlisted.py", ""),
        ("dilated_models/layers/__init__.py", "from dilated_core.reference import oracle"),
        ("dilated_core/reference.py", "import dilated_core.strips\noracle = 1"),
        ("dilated_core/merge.py", "import dilated_core.testing.cases"),
        ("dilated_models/layers/__init__.py", "from dilated_core.testing import cases"),
    ],
)
def test_every_other_direction_is_refused(tmp_path: Path, file: str, text: str) -> None:
    result = run_contracts(tmp_path, GOOD | {file: text})
    assert result.returncode == 1, result.stdout
    assert "BROKEN" in result.stdout


def test_every_package_is_named_in_the_contracts_and_the_sources() -> None:
    tables = tomllib.loads(CONFIG)["tool"]
    packages = find_packages()
    names = [package.import_name for package in packages.values()]
    assert tables["importlinter"]["root_packages"] == names
    assert list(tables["uv"]["sources"]) == list(packages)
