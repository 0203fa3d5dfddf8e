import logging
import time

import pytest

from fastdiff.progress import progress

LAST = [(989, "0:18:20"), (995, "0:08:20")]  # 10 minutes apart


@pytest.fixture
def clock(monkeypatch):
    """A clock to set."""
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    return now


def lines(caplog) -> list[str]:
    return [record.message for record in caplog.records]


def test_a_line_now_and_then(clock, caplog):
    caplog.set_level(logging.INFO)
    with progress(2000, "steps", done=1000) as advance:
        for k in range(1, 1001):
            clock[0] = 100.0 * k
            advance(1, f"loss {k}")
    assert lines(caplog)[0] == "1,001 of 2,000 steps, loss 1, about 1 day, 3:45:00 left"
    assert lines(caplog)[-2:] == [f"{1_000 + k:,} of 2,000 steps, loss {k}, about {left} left" for k, left in LAST]
    assert len(caplog.records) < 200


def test_no_line_of_what_is_soon_done(clock, caplog):
    caplog.set_level(logging.INFO)
    with progress(9, "steps") as advance:
        for _ in range(9):
            clock[0] += 1
            advance(1)
    assert lines(caplog) == []


def test_work_inside_work_is_a_part_of_it(clock, caplog):
    caplog.set_level(logging.INFO)
    with progress(2, "texts") as advance:
        for _ in range(2):
            with progress(4, "passes") as advance_inner:
                for _ in range(4):
                    clock[0] += 10
                    advance_inner(1)
            advance(1)
    assert len(caplog.records) == 8
    assert lines(caplog)[0] == "0 of 2 texts, 1 of 4 passes, about 0:01:10 left"
    assert lines(caplog)[5] == "1 of 2 texts, 2 of 4 passes, about 0:00:20 left"


def test_on_a_terminal_it_is_a_bar(monkeypatch, capsys, caplog):
    monkeypatch.setenv("FORCE_COLOR", "1")  # rich then takes anything for a terminal
    with progress(2, "texts") as advance, progress(4, "passes") as advance_inner:
        advance_inner(2)
        advance(1, "a note")
    shown = capsys.readouterr().err
    assert "1 of 2 texts, a note" in shown
    assert lines(caplog) == []
