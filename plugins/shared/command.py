"""What every misf command shares: options, logging to stderr, one line and the right exit code for a known failure.

    @command("misf-thing")
    @click.argument("model")
    def main(model: str) -> int | None:
        '''Do the thing.'''
        log.info("goes to stderr")      # log = logging.getLogger(__name__)
        raise MisfError("one line; exit code 1")

The function may return its exit code (None is 0). Imports stay light: click only.
"""

from __future__ import annotations

import codecs
import contextlib
import io
import json
import logging
import os
import re
import signal
import sys
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from types import FrameType
from typing import Any, NoReturn

import click

from .errors import FAILURE, INTERRUPTED, MisfError

LONGEST_LINE = 800
LOG_LEVELS = ("DEBUG", "INFO", "WARNING", "ERROR")

log = logging.getLogger("misf")
_subject: ContextVar[str] = ContextVar("subject", default="")


def one_line(error: BaseException) -> str:
    """Return an exception's message as one line: 'FILE: reason' for an OSError, never empty, cut where it rambles."""
    if isinstance(error, FileNotFoundError) and error.strerror and not error.filename:
        text = "the working folder no longer exists: change to another"  # what os.getcwd raises
    elif isinstance(error, OSError) and error.strerror:
        text = f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    elif isinstance(error, MemoryError):
        text = str(error) or "out of memory"
    else:
        text = str(error) or type(error).__name__
    line = " ".join(text.split())
    return line if len(line) <= LONGEST_LINE else line[:LONGEST_LINE] + " ..."


def misf_version() -> str:
    """Return the installed version of misf."""
    from importlib.metadata import version

    return version("misf")


def print_json(document: object) -> None:
    """Print the one JSON document of a command on stdout."""
    click.echo(json.dumps(document, indent=2))


def wants_progress_bar() -> bool:
    """Return whether stderr is a terminal and progress is wanted."""
    return sys.stderr.isatty() and log.isEnabledFor(logging.INFO)


@contextlib.contextmanager
def log_about(subject: str) -> Iterator[None]:
    """Prefix every line logged inside the block with `subject`, such as "x.png: "."""
    token = _subject.set(subject)
    try:
        yield
    finally:
        _subject.reset(token)


def current_subject() -> str:
    """Return what lines begin with at the moment, for handlers of other kinds."""
    return _subject.get()


class _StderrHandler(logging.Handler):
    """Writes to whatever sys.stderr is now, so that progress bars and test runners may replace it."""

    def emit(self, record: logging.LogRecord) -> None:
        prefix = f"{record.levelname.lower()}: " if record.levelno >= logging.WARNING else ""
        subject = _subject.get()
        text = self.format(record).removeprefix(subject.rpartition("/")[2])  # some lines name their file themselves
        print(prefix + subject + text, file=sys.stderr, flush=True)  # click.echo would write past a progress bar


def set_up_logging(verbose: bool = False, quiet: bool = False) -> None:
    """Send the log of misf to stderr: flags win over MISF_LOG_LEVEL, which wins over INFO.

    Raises ValueError for an unknown MISF_LOG_LEVEL.
    """
    level = "DEBUG" if verbose else "ERROR" if quiet else os.environ.get("MISF_LOG_LEVEL", "").upper() or "INFO"
    if level not in LOG_LEVELS:
        raise ValueError(f"MISF_LOG_LEVEL is {level!r}: expected one of {', '.join(LOG_LEVELS)}")
    for handler in [handler for handler in log.handlers if isinstance(handler, _StderrHandler)]:
        log.removeHandler(handler)
    log.addHandler(_StderrHandler())
    log.setLevel(level)
    log.propagate = False


class Command(click.Command):
    """A click command with -v, -q, --version and -h, whose known failures are one line on stderr and our exit code."""

    def __init__(self, *args: Any, **settings: Any) -> None:
        settings.setdefault("context_settings", {}).setdefault("help_option_names", ["-h", "--help"])
        super().__init__(*args, **settings)
        self.params += [
            click.Option(["-v", "--verbose"], is_flag=True, help="Say more, with tracebacks of known failures."),
            click.Option(["-q", "--quiet"], is_flag=True, help="Say only errors."),
            click.Option(
                ["--version"],
                is_flag=True,
                is_eager=True,
                expose_value=False,
                callback=_print_version,
                help="Print the version and exit.",
            ),
        ]

    def invoke(self, ctx: click.Context) -> Any:
        """Return what the command's function returns, after setting up the log and OpenMP's threads."""
        # Read when PyTorch is loaded, which is later. By default OpenMP's threads spin while they wait for each other:
        # beside a busy process, or within a container's quota, that made misf-eval twenty times as slow.
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
        set_up_logging(ctx.params.pop("verbose"), ctx.params.pop("quiet"))
        return super().invoke(ctx)

    def main(self, *args: Any, **settings: Any) -> Any:
        """Run the command and exit with its code."""
        _prepare_streams()
        run: Callable[..., Any] = super().main
        if not settings.pop("standalone_mode", True):
            return run(*args, standalone_mode=False, **settings)
        name = settings.get("prog_name") or self.name or "misf"
        previous = _terminate_by_exception()
        try:
            code = run(*args, standalone_mode=False, **settings)
        except click.ClickException as error:
            hint = f" (see {name} --help)" if isinstance(error, click.UsageError) else ""
            _fail(f"{name}: {' '.join(error.format_message().split())}{hint}", error.exit_code)
        except (KeyboardInterrupt, click.Abort):
            _fail(f"{name}: interrupted", INTERRUPTED)
        except (MisfError, ValueError, OSError, MemoryError) as error:
            log.debug("the failure in full:", exc_info=True)
            _fail(f"{name}: {one_line(error)}", getattr(error, "exit_code", FAILURE))
        finally:
            if previous is not None:
                signal.signal(signal.SIGTERM, previous)
        sys.exit(code if isinstance(code, int) else 0)


class HxW(click.ParamType):  # type: ignore[type-arg] # no generic before click 8.4
    """A size as HxW, converted to (H, W); with_batch: HxW or NxHxW, converted to (N, H, W)."""

    def __init__(self, with_batch: bool = False) -> None:
        self.with_batch, self.name = with_batch, "[Nx]HxW" if with_batch else "HxW"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, ...]:
        """Return the sides as numbers; a usage error where they are none, or 0."""
        match = re.fullmatch(r"(?:(\d{1,3})x)?(\d{1,5})x(\d{1,5})", str(value))
        sides = tuple(int(side) for side in match.groups(default="1")) if match else (0,)
        if not match or not all(sides) or (match[1] and not self.with_batch):
            self.fail(
                f"expected {self.name.replace('[Nx]HxW', 'HxW or NxHxW')} such as 512x768, got {value!r}", param, ctx
            )
        return sides if self.with_batch else sides[1:]


def command(name: str, **settings: Any) -> Callable[[Callable[..., Any]], Command]:
    """Return a decorator like click.command() that makes our Command."""
    return click.command(name, cls=Command, **settings)


def _print_version(ctx: click.Context, _param: click.Parameter, value: bool) -> None:
    if value:
        click.echo(f"{ctx.command.name} {misf_version()}")
        ctx.exit()


def _fail(line: str, code: int) -> NoReturn:
    click.echo(line, err=True)
    sys.exit(code)


def _prepare_streams() -> None:
    """Make sure that stdout and stderr can be written to."""
    # If stderr is closed, the next file opened would get number 2, and with it what libraries print there.
    while (number := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(number)
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, os.fdopen(os.open(os.devnull, os.O_WRONLY), "w", encoding="utf-8"))
    if isinstance(sys.stdout, io.TextIOWrapper):
        codecs.register_error("misf.file_name", _as_in_the_file_system)
        sys.stdout.reconfigure(errors="misf.file_name")


def _as_in_the_file_system(error: UnicodeError) -> tuple[str | bytes, int]:
    """Return the bytes of a file name that stdout's encoding does not know: they are what another program needs."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    try:
        return os.fsencode(error.object[error.start : error.end]), error.end
    except UnicodeEncodeError:
        return codecs.backslashreplace_errors(error)


def _terminate_by_exception() -> Any:
    """Turn SIGTERM into SystemExit, so that temporary files are removed; return the handler that was set before."""

    def stop(_number: int, _frame: FrameType | None) -> NoReturn:
        sys.exit(128 + signal.SIGTERM)

    try:
        return signal.signal(signal.SIGTERM, stop)
    except ValueError:  # not in the main thread
        return None
