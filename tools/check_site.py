"""Check that site/, as built, loads nothing from another server: `python -m tools.check_site`.

Links that a reader follows may lead anywhere; scripts, styles, fonts and pictures must be in site/.
"""

import re
import sys
from collections.abc import Iterator
from pathlib import Path

from tools.packages import ROOT
from tools.report import report

_IN_PAGES = re.compile(
    r"<(?:script|img|link|iframe|source|video|object)\b[^>]*?\b(?:src|href|data)="
    r"[\"']?((?:https?:)?//[^\"'\s>]+)"
)
_IN_STYLES = re.compile(r"(?:url\(|@import\s+)[\"']?((?:https?:)?//[^\"')\s]+)")


def main(site: Path = ROOT / "site") -> int:
    """Print every address that a page or a style loads; 1 if there is one."""
    return report(list(loaded_from_elsewhere(site)), "the site loads nothing from another server")


def loaded_from_elsewhere(site: Path) -> Iterator[str]:
    """One line for each address that a page or a style of the site loads from another server."""
    for suffix, pattern in ((".html", _IN_PAGES), (".css", _IN_STYLES)):
        for path in sorted(site.rglob(f"*{suffix}")):
            for address in pattern.findall(path.read_text(encoding="utf-8")):
                yield f"{path.relative_to(site)} loads {address}"


if __name__ == "__main__":
    sys.exit(main())
