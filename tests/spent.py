"""Which test files take the most processor time, with all processes that they start: told when many have run."""

import os
from collections import defaultdict

import pytest

MANY = 10
_last = 0.0
_spent = defaultdict(float)


def processor_s():
    """Seconds of user and system time so far, of this process and of those that it has waited for."""
    return sum(os.times()[:4])


def pytest_collection_finish():
    global _last
    _last = processor_s()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport():
    """What was spent since the report before; travels with the report, from a worker of xdist too."""
    global _last
    report = yield
    before, _last = _last, processor_s()
    report.processor_s = _last - before
    return report


def pytest_runtest_logreport(report):
    _spent[report.nodeid.partition("::")[0]] += getattr(report, "processor_s", 0.0)


def pytest_terminal_summary(terminalreporter):
    if len(_spent) <= MANY:
        return
    terminalreporter.section("most processor time")
    for path in sorted(_spent, key=_spent.get, reverse=True)[:MANY]:
        terminalreporter.line(f"{_spent[path]:8.1f} s  {path}")
    terminalreporter.line(f"{sum(_spent.values()):8.1f} s  all {len(_spent)} files, without start and collection")
