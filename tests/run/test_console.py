"""What a process's log shows of names that others chose."""

import logging

from tide_mega.run.console import set_up_logging


def test_a_name_can_neither_steer_the_terminal_nor_pass_for_a_line_of_the_log(capsys, monkeypatch):
    monkeypatch.setenv("RANK", "0")
    logger = logging.getLogger("tide_mega")
    before = logger.handlers, logger.propagate, logger.level
    try:
        set_up_logging()
        logger.info("%s is left out", "a\x1b[2J\rb\n12:00:00 the run is complete\u2028c")
        try:
            raise ValueError("kept as it is")
        except ValueError:
            logger.exception("failed")
    finally:
        logger.handlers, logger.propagate, logger.level = before
    first, second, *rest = capsys.readouterr().out.splitlines()
    assert first.endswith(" a\\x1b[2J\\rb")
    assert second == "    12:00:00 the run is complete\\u2028c is left out"
    assert rest[1] == "Traceback (most recent call last):" and rest[-1] == "ValueError: kept as it is"
