"""A rank's own log, and who is slow."""

import logging
import warnings

import pytest

from hyena_dist.config.errors import ConfigError
from hyena_dist.runtime.logs import RankLog, slow_ranks

logger = logging.getLogger("hyena_dist.test")


def _a_run(tmp_path) -> None:
    with RankLog(tmp_path, 3):
        logger.info("a note")
        warnings.warn("a warning", stacklevel=1)
        logger.error("an error")
        raise ZeroDivisionError("a defect")


def _a_mistake(tmp_path) -> None:
    with RankLog(tmp_path, 3):
        raise ConfigError("one line")


def test_the_file_has_what_the_terminal_does_not_show(tmp_path, capsys):
    terminal = logging.StreamHandler()
    root = logging.getLogger()
    level = root.level
    root.addHandler(terminal)
    root.setLevel(logging.ERROR)  # as on every rank but the first
    try:
        with pytest.raises(ZeroDivisionError):
            _a_run(tmp_path)
        assert root.level == logging.ERROR
        with pytest.raises(ConfigError):  # started again: appended
            _a_mistake(tmp_path)
        logger.error("afterwards")
    finally:
        root.removeHandler(terminal)
        root.setLevel(level)
    text = (tmp_path / "logs" / "rank-00003.log").read_text()
    for expected in ("INFO hyena_dist.test: a note", "UserWarning: a warning", "ERROR hyena_dist.test: an error",
                     "Traceback", "ZeroDivisionError: a defect", "the run ended: one line"):
        assert expected in text, expected
    assert text.count("Traceback") == 1  # a user's mistake is one line
    assert "afterwards" not in text
    assert capsys.readouterr().err == "an error\nafterwards\n"


def test_a_full_disk_loses_log_lines_only(tmp_path, capsys, monkeypatch):
    with RankLog(tmp_path, 0) as log:
        def full(_text: str) -> int:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(log._handler.stream, "write", full)
        monkeypatch.setattr(log._handler.stream, "flush", lambda: full(""))  # as closing does too
        logger.error("lost")
    assert "Logging error" not in capsys.readouterr().err


def test_where_it_cannot_be_opened_is_said(tmp_path):
    (tmp_path / "logs").touch()
    with pytest.raises(OSError, match="rank-00000.log: could not be written"):
        RankLog(tmp_path, 0).__enter__()


@pytest.mark.parametrize(("loading", "forward", "expected"), [
    ([0.1, 0.1, 0.1, 0.4], [1.0, 1.0, 1.0, 1.0], (3, "loading data", 0.4, 0.1)),
    ([0.0, 0.0], [1.0, 1.6], (1, "forward", 1.6, 1.0)),
    ([0.4, 0.1, 0.1], [1.0, 1.0, 2.0], (2, "forward", 2.0, 1.0)),  # the one that costs more
    ([0.1, 0.1], [1.0, 1.4], None),
    ([0.001, 0.010], [0.001, 0.001], None),  # ten times nothing
    ([0.1], [1.0], None),
])
def test_who_is_slow(loading, forward, expected):
    found = slow_ranks(loading, forward)
    assert (None if found is None else (*found.ranks, found.part, found.seconds, found.median)) == expected


@pytest.mark.parametrize(("forward", "expected"), [
    ([1.4, 1.0, 1.0, 1.0], None),  # rank 0 has waited for rank 1, which began later
    ([1.0, 1.0, 3.0, 3.1], (2, 3)),
    ([3.0, 3.0, 1.0, 3.0], (0, 1)),
])
def test_ranks_that_wait_for_each_other_are_slow_together(forward, expected):
    found = slow_ranks([0.1] * 4, forward, together=2)
    assert (None if found is None else found.ranks) == expected
    assert slow_ranks([0.1] * 4, forward, together=4) is None
    assert slow_ranks([0.1, 0.1, 0.1, 0.5], forward, together=4).ranks == (3,)
