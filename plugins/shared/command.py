"""The features of every misf command: options, logging to stderr, one line and an exit code for a known failure.

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

from .errors import ENVIRONMENT, FAILURE, INTERRUPTED, MisfError

LONGEST_LINE = 800
LOG_LEVELS = ("DEBUG", "INFO", "WARNING", "ERROR")

log = logging.getLogger("misf")
_subject: ContextVar[str] = ContextVar("subject", default="")


def one_line(error: BaseException) -> str:
    """Return an exception's message as one line, 'FILE: reason' for an OSError; never empty, and cut if it is long."""
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


def print_line(text: str) -> None:
    """Print a result on stdout, at once; characters that its encoding lacks as the bytes of a file name.

    click.echo would write past a progress bar, and question marks for those characters.
    """
    try:
        print(text, flush=True)
    except OSError as error:
        error.filename = "stdout"  # for one_line
        raise


def print_json(document: object) -> None:
    """Print a command's JSON document on stdout."""
    print_line(json.dumps(document, indent=2))


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
    """Return the current prefix of log lines, for other logging handlers."""
    return _subject.get()


class _StderrHandler(logging.Handler):
    """Writes to the current sys.stderr, which progress bars and test runners may replace."""

    def emit(self, record: logging.LogRecord) -> None:
        prefix = f"{record.levelname.lower()}: " if record.levelno >= logging.WARNING else ""
        subject = _subject.get()
        text = self.format(record).removeprefix(subject.rpartition("/")[2])  # some lines name their file themselves
        print(prefix + subject + text, file=sys.stderr, flush=True)  # click.echo would write past a progress bar


def set_up_logging(verbose: bool = False, quiet: bool = False) -> None:
    """Send the log of misf to stderr, at the level of the flags, else of MISF_LOG_LEVEL, else INFO.

    Raises:
        ValueError: MISF_LOG_LEVEL is not a log level.

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
    """A click command with -v, -q, --version and -h that reports a known failure as one line and an exit code."""

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
        """Set up logging and OpenMP, run the command's function and return its result."""
        # PyTorch reads this when it is loaded, which is later. By default OpenMP threads spin while they wait for each
        # other: next to a busy process, or within a container's quota, that made misf-eval twenty times slower.
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
        except (MisfError, ValueError, OSError, MemoryError, ImportError) as error:
            log.debug("the failure in full:", exc_info=True)
            code = ENVIRONMENT if isinstance(error, ImportError) else getattr(error, "exit_code", FAILURE)
            _fail(f"{name}: {one_line(error)}", code)
        finally:
            if previous is not None:
                signal.signal(signal.SIGTERM, previous)
        sys.exit(code if isinstance(code, int) else 0)


class HxW(click.ParamType):  # type: ignore[type-arg] # no generic before click 8.4
    """A size HxW, converted to (H, W) or, using `with_batch`, a size HxW or NxHxW, converted to (N, H, W)."""

    def __init__(self, with_batch: bool = False) -> None:
        self.with_batch, self.name = with_batch, "[Nx]HxW" if with_batch else "HxW"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, ...]:
        """Return the sides as numbers; a usage error if one is not a number or is 0."""
        match = re.fullmatch(r"(?:(\d{1,3})x)?(\d{1,5})x(\d{1,5})", str(value))
        sides = tuple(int(side) for side in match.groups(default="1")) if match else (0,)
        if not match or not all(sides) or (match[1] and not self.with_batch):
            self.fail(
                f"expected {self.name.replace('[Nx]HxW', 'HxW or NxHxW')} such as 512x768, got {value!r}", param, ctx
            )
        return sides if self.with_batch else sides[1:]


def command(name: str, **settings: Any) -> Callable[[Callable[..., Any]], Command]:
    """Return a decorator like click.command() that makes a `Command`."""
    return click.command(name, cls=Command, **settings)


def _print_version(ctx: click.Context, _param: click.Parameter, value: bool) -> None:
    if value:
        click.echo(f"{ctx.command.name} {misf_version()}")
        ctx.exit()


def _fail(line: str, code: int) -> NoReturn:
    click.echo(line, err=True)
    sys.exit(code)


def _prepare_streams() -> None:
    """Make sure that stdout and stderr are writable."""
    # If stderr is closed, the next opened file would get descriptor 2 and receive what libraries print to stderr.
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
    """Encode characters of a file name that stdout cannot encode as their original bytes, for other programs."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    try:
        return os.fsencode(error.object[error.start : error.end]), error.end
    except UnicodeEncodeError:
        return codecs.backslashreplace_errors(error)


def _terminate_by_exception() -> Any:
    """Turn SIGTERM into SystemExit, so that temporary files are removed; return the previous handler."""

    def stop(_number: int, _frame: FrameType | None) -> NoReturn:
        sys.exit(128 + signal.SIGTERM)

    try:
        return signal.signal(signal.SIGTERM, stop)
    except ValueError:  # not in the main thread
        return None
