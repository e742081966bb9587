"""A plugin that shows percentages in the place of ten thousand dots: `-p percentages`, with tests/ on the
path of Python. Tests that fail still leave a letter there.
"""

from __future__ import annotations

import sys
from typing import Any, Optional

import pytest

_STEP = 5
"""Per cent from one figure to the next."""


class Percentages:
    """Counts the tests that have ended. session: whose `testscollected` says how many there are."""

    def __init__(self, session: Any) -> None:
        self._session, self._ended, self._shown = session, 0, 0

    @pytest.hookimpl(tryfirst=True)
    def pytest_report_teststatus(self, report: Any) -> Optional[tuple[str, str, str]]:
        if report.passed or report.skipped:
            return ("skipped" if report.skipped else "passed" if report.when == "call" else "", "", "")
        return None

    def pytest_runtest_logfinish(self) -> None:
        self._ended += 1
        share = 100 * self._ended // max(self._session.testscollected, 1)
        if share >= self._shown + _STEP:
            self._shown = share // _STEP * _STEP
            sys.stdout.write(f" {self._shown}%")
            sys.stdout.flush()


@pytest.hookimpl(trylast=True)
def pytest_sessionstart(session: pytest.Session) -> None:
    """Only where results are shown: the processes that run them for it have none to show."""
    config = session.config
    if not hasattr(config, "workerinput"):
        config.pluginmanager.register(Percentages(session))
