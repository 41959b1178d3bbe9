"""Atomic writing of files: a target is written completely or not at all."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path

_PREFIX = ".misf-"
"""Start of a temporary file's name; 16 hexadecimal digits and the target's suffix follow."""


@contextlib.contextmanager
def written_whole(target: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary path beside `target`, with the same suffix; move it to `target` when the block succeeds.

    When the block fails, the temporary file is removed and an existing target stays as it was. A process that is killed
    by SIGKILL may leave a temporary file, which is hidden. Symbolic links are followed, and the mode of an existing
    file is kept.

    Raises:
        OSError: the target cannot be written (no such folder, read-only, disk full) or is not a regular file; the
            message names the target.

    """
    path = Path(os.path.realpath(target))
    if path.exists() and not path.is_file():
        kind = "a folder" if path.is_dir() else "not a regular file"
        raise OSError(f"cannot write {target}: it is {kind}")
    temporary = path.with_name(f"{_PREFIX}{secrets.token_hex(8)}{path.suffix}")
    try:
        # O_EXCL respects the user's umask, unlike tempfile.mkstemp.
        os.close(os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
        yield temporary
        if path.exists():
            temporary.chmod(path.stat().st_mode & 0o7777)
        temporary.replace(path)
    except OSError as error:
        raise OSError(f"cannot write {target}: {error.strerror or error}") from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


@contextlib.contextmanager
def folder_written_whole(target: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary folder beside `target`; put it in the place of `target` when the block succeeds.

    An existing folder is replaced with all that is in it. When the block fails, it stays as it was.

    Raises:
        OSError: the target cannot be written, or is not a folder; the message names it.

    """
    path = Path(os.path.realpath(target))
    if path.exists() and not path.is_dir():
        raise OSError(f"cannot write {target}: it is not a folder")
    if Path.cwd().is_relative_to(path):  # this and the user's other programs would stand in a folder that is gone
        raise OSError(f"cannot replace {target}: the working folder is in it, so name another")
    temporary, former = (path.with_name(f"{_PREFIX}{secrets.token_hex(8)}") for _ in range(2))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.mkdir()
        yield temporary
        if path.exists():
            path.rename(former)
        try:
            temporary.rename(path)
        except OSError:
            if former.exists():
                former.rename(path)
            raise
    except OSError as error:
        raise OSError(f"cannot write {target}: {error.strerror or error}") from error
    finally:
        for left in (temporary, former):
            shutil.rmtree(left, ignore_errors=True)


def remove_unfinished(folder: str | os.PathLike[str]) -> None:
    """Remove temporary files that killed processes left in a folder. No other process may be writing there."""
    for path in Path(folder).glob(f"{_PREFIX}{'[0-9a-f]' * 16}*"):
        with contextlib.suppress(OSError):
            path.unlink()


class JsonLines:
    """A file to which records are appended, a line of JSON each: a context manager.

    A line is written at once, so that a process that is killed leaves whole lines, and several may share a file. Raises
    OSError, naming the file, when it cannot be written.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self._path = Path(path)
        with self._naming():
            self._file = self._path.open("ab", buffering=0)
            if self._path.is_file():
                with self._path.open("rb") as before:
                    before.seek(max(0, self._path.stat().st_size - 1))
                    if before.read() not in (b"", b"\n"):
                        self._file.write(b"\n")  # what was cut off there stays on a line of its own

    def append(self, record: object) -> None:
        """Write a record."""
        line = json.dumps(record).encode() + b"\n"
        with self._naming():
            written = self._file.write(line)
            if written < len(line):  # the disk is full
                os.ftruncate(self._file.fileno(), os.fstat(self._file.fileno()).st_size - written)
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def __enter__(self) -> JsonLines:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    @contextlib.contextmanager
    def _naming(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise OSError(f"cannot write {self._path}: {error.strerror}") from error


def sha256(path: str | os.PathLike[str]) -> str:
    """Return the SHA-256 of a file in hexadecimal."""
    digest = hashlib.sha256()
    with Path(path).open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
