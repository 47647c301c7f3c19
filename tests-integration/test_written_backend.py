"""The backend that docs/write-a-backend.md writes passes the suite that every backend must pass.

It is the code of the page itself, so the page cannot fall behind the contract.
"""

from collections.abc import Iterator

import pytest
from dilated_core import register_backend, unregister_backend

from tools.packages import ROOT
from tools.page_examples import run_page

_, PAGE = run_page(ROOT / "docs" / "write-a-backend.md")
TestDouble = PAGE["TestDouble"]


@pytest.fixture(scope="module", autouse=True)
def registered() -> Iterator[None]:
    """The page takes its backend back at its end; the suite needs it again."""
    register_backend(PAGE["DoubleBackend"]())
    yield
    unregister_backend("double")
