"""Atomic writing of files: a target is written completely or not at all."""

from __future__ import annotations

import contextlib
import hashlib
import os
import secrets
from collections.abc import Iterator
from pathlib import Path

_PREFIX = ".misf-"
"""Start of a temporary file's name; 16 hexadecimal digits and the target's suffix follow."""


@contextlib.contextmanager
def written_whole(target: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary path beside `target`, with the same suffix; move it to `target` when the block succeeds.

    When the block fails, the temporary file is removed and an existing target stays as it was. Symbolic links are
    followed, and the mode of an existing file is kept.

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


def remove_unfinished(folder: str | os.PathLike[str]) -> None:
    """Remove temporary files that killed processes left in a folder. No other process may be writing there."""
    for path in Path(folder).glob(f"{_PREFIX}{'[0-9a-f]' * 16}*"):
        with contextlib.suppress(OSError):
            path.unlink()


def sha256(path: str | os.PathLike[str]) -> str:
    """Return the SHA-256 of a file in hexadecimal."""
    digest = hashlib.sha256()
    with Path(path).open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
