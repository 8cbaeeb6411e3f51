"""The run's log on a disk that is full, and with what should not reach a terminal."""

import logging

from beit.console import LogFile, RunLog


def test_a_full_disk_is_told_once_and_ends_nothing(tmp_path, capsys):
    (tmp_path / "train.log").symlink_to("/dev/full")
    logger = logging.getLogger("beit")
    with RunLog() as run_log:
        logger.warning("before")
        run_log.open(tmp_path / "train.log")
        for number in range(3):
            logger.warning("line %d", number)
    said = [line for line in capsys.readouterr().err.splitlines() if "cannot be written" in line]
    assert len(said) == 1
    assert "No space left on device" in said[0]


def test_without_the_guard_it_would_raise_at_the_end(tmp_path):
    (tmp_path / "train.log").symlink_to("/dev/full")
    handler = LogFile(tmp_path / "train.log")
    try:
        handler.stream.write("x")
        logging.FileHandler.close(handler)
    except OSError:
        return
    raise AssertionError("closing a full file does not raise any more: the guard may go")


def test_a_line_cannot_act_on_the_terminal(tmp_path):
    logger = logging.getLogger("beit")
    with RunLog() as run_log:
        run_log.open(tmp_path / "train.log")
        logger.warning("two\nlines \x1b[2J and half a character \udcff")
    text = (tmp_path / "train.log").read_text(encoding="utf-8")
    assert text.endswith("two\nlines \\x1b[2J and half a character \\udcff\n")
