"""Progress on stderr: a bar on a terminal; elsewhere, if a command wants it, one line per minute with the time left."""

from __future__ import annotations

import contextlib
import logging
import sys
import time
from collections.abc import Iterator
from typing import Any, Protocol

from .command import wants_progress_bar

log = logging.getLogger(__name__)

LINE_SECONDS = 60.0


class Step(Protocol):
    """Reports progress."""

    def __call__(self, done: int, total: int | None = None, text: str = "") -> None:
        """Report how many parts are done, the total if it has changed, and a short text."""


@contextlib.contextmanager
def bar() -> Iterator[Any]:
    """Yield a rich Progress on stderr, or None if stderr is not a terminal or the user does not want progress."""
    if not wants_progress_bar():
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    # Rich prints stdout above its bar, on stderr: right for a terminal, wrong for results that go into a pipe.
    redirect = sys.stdout.isatty()
    with Progress(*columns, console=Console(stderr=True), transient=True, redirect_stdout=redirect) as shown:
        yield shown


@contextlib.contextmanager
def progress(what: str, total: int | None = None, start: int = 0, lines: bool = False) -> Iterator[Step]:
    """Yield a Step that updates the progress.

    Args:
        what: the name of the parts, such as "pictures".
        total: the number of parts; None if a later step gives it.
        start: the number of parts that are already done.
        lines: write a line per minute if there is no bar.

    """
    with bar() as shown:
        if shown is not None:
            task = shown.add_task(what, total=total, completed=start)

            def move(done: int, total: int | None = None, text: str = "") -> None:
                shown.update(task, completed=done, total=total, description=f"{what} {text}".rstrip())

            yield move
            return
        begun = said = time.monotonic()

        def say(done: int, total: int | None = total, text: str = "") -> None:
            nonlocal said
            now = time.monotonic()
            if not lines or now - said < LINE_SECONDS:
                return
            said = now
            words = [f"{what}: {done} of {total or '?'}", *([text] if text else [])]
            if total and done > start:
                words.append(f"{duration((total - done) * (now - begun) / (done - start))} left")
            log.info("%s", ", ".join(words))

        yield say


def duration(seconds: float) -> str:
    """Format a remaining time: 40 s, 12 min, 3 h 20 min."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60} min"
