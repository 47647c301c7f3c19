"""Pytest plugin: run one share of the tests, and write each outcome down as it comes.

`python -m pytest -p tools.pytest_record --record FILE --share 0/4` runs every fourth test. FILE
gets one JSON object a line, also when a test starts, so that a run which is killed still tells
which tests passed and which one it was in.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add `--record` and `--share`."""
    parser.addoption("--record", required=True, help="file for the outcomes")
    parser.addoption("--share", default="0/1", help="I/N: every N-th test, from the I-th on")


def pytest_configure(config: pytest.Config) -> None:
    """Start recording."""
    config.pluginmanager.register(_Recorder(Path(str(config.getoption("--record")))), "recorder")


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Keep this share of what the other options left."""
    index, count = map(int, str(config.getoption("--share")).split("/"))
    items[:] = items[index::count]


class _Recorder:
    def __init__(self, path: Path) -> None:
        self._path = path

    def _write(self, **record: Any) -> None:
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            self._write(event="uncollected", test=report.nodeid, message=_last_line(report))

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        self._write(event="selected", count=len(session.items))

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self._write(event="started", test=nodeid)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        # A test has three reports; those of setting up and tearing down matter when they fail.
        if report.when == "call" or not report.passed:
            message = "" if report.passed else _last_line(report)
            self._write(
                event="outcome",
                test=report.nodeid,
                outcome=report.outcome,
                seconds=round(report.duration, 2),
                message=message,
                detail=str(report.longrepr)[-2000:] if report.failed else "",
            )

    def pytest_warning_recorded(self, warning_message: Any) -> None:
        category = warning_message.category.__name__
        self._write(event="warning", message=f"{category}: {warning_message.message}"[:300])


def _last_line(report: pytest.CollectReport | pytest.TestReport) -> str:
    """What went wrong, in one line: the text of the exception, or why it was skipped."""
    crash = getattr(report.longrepr, "reprcrash", None)
    if crash is not None:
        return str(crash.message).splitlines()[0][:300]
    if isinstance(report.longrepr, tuple):
        return str(report.longrepr[2])[:300]
    errors = [
        line.removeprefix("E ").strip()
        for line in str(report.longrepr).splitlines()
        if line.startswith("E ")
    ]
    return (errors or str(report.longrepr).splitlines() or [""])[-1][:300]
