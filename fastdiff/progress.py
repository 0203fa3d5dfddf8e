"""How far long work is: a bar on a terminal, elsewhere a line of the log now and then."""

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from datetime import timedelta
from typing import Any

_log = logging.getLogger(__name__)  # at level INFO, which the command shows
_LEAST, _MOST = 10, 600  # seconds between two lines; in between, a tenth of what has passed
_Show = Callable[[str, float], None]  # of what is done, in words and as a share


class _Work:
    """Done of total units; inside others, a part of one unit of theirs."""

    def __init__(self, total: int, unit: str, done: int, outer: "_Work | None", show: _Show) -> None:
        self.total, self.unit, self.done, self.outer, self.show = max(total, 1), unit, done, outer, show

    def advance(self, done: int, note: str = "") -> None:
        self.done += done
        self.show(self._words() + (f", {note}" if note else ""), self._share())

    def _words(self) -> str:
        own = f"{self.done:,} of {self.total:,} {self.unit}"
        return own if self.outer is None else f"{self.outer._words()}, {own}"

    def _share(self, inner: float = 0.0) -> float:
        """Of the outermost."""
        share = (self.done + inner) / self.total
        return share if self.outer is None else self.outer._share(share)


_WORK: ContextVar[_Work | None] = ContextVar("what is at work", default=None)


@contextmanager
def progress(total: int, unit: str, done: int = 0) -> Iterator[Callable[..., None]]:
    """Shows how far work is, of which some may be done already: what to call with the number just done, and a note.

    Where stderr is a terminal and rich is installed, a bar; else lines of the log, at level INFO. Work inside other
    work shows with that.
    """
    outer = _WORK.get()
    with _shown(done / max(total, 1)) if outer is None else nullcontext(outer.show) as show:
        work = _Work(total, unit, done, outer, show)
        token = _WORK.set(work)
        try:
            yield work.advance
        finally:
            _WORK.reset(token)


@contextmanager
def _shown(share: float) -> Iterator[_Show]:
    console = _terminal()
    if console is None:
        yield _lines(share)
        return
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

    columns = (BarColumn(16), TaskProgressColumn(), TextColumn("{task.description}"), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("", total=1.0)
        bar.update(task, completed=share)
        yield lambda words, share: bar.update(task, completed=share, description=words)


def _terminal() -> Any:
    """A console of rich on stderr, or None."""
    try:
        from rich.console import Console
    except ImportError:
        return None
    console = Console(stderr=True)
    return console if console.is_terminal else None


def _lines(first: float) -> _Show:
    begun = told = time.monotonic()

    def show(words: str, share: float) -> None:
        nonlocal told
        now = time.monotonic()
        if share > first and now - told >= min(_MOST, max(_LEAST, (now - begun) / 10)):
            told = now
            left = timedelta(seconds=round((now - begun) * max(0.0, 1 - share) / (share - first)))
            _log.info("%s, about %s left", words, left)

    return show
