"""A plugin of pytest: writes down how every test went as soon as it has, in the directory GPU_CHECK_NOTES."""

import json
import os
from pathlib import Path

import pytest

from benchmarks.gpu.task import FINDINGS


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.when != "call" and report.outcome == "passed":
        return
    why = ""
    if report.outcome == "failed":
        crash = getattr(report.longrepr, "reprcrash", None)
        why = " ".join(str(crash.message if crash else report.longrepr).split())
        why = why if len(why) < 500 else f"{why[:150]} ... {why[-340:]}"  # a rank's traceback says last what it was
    elif report.outcome == "skipped" and isinstance(report.longrepr, tuple):
        why = report.longrepr[2].removeprefix("Skipped: ")
    row = {"test": report.nodeid, "outcome": report.outcome, "seconds": round(report.duration, 2), "why": why,
           "found": dict(report.user_properties)}
    with Path(os.environ["GPU_CHECK_NOTES"], FINDINGS).open("a", encoding="utf-8") as file:
        file.write(json.dumps(row, default=str) + "\n")
