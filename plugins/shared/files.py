"""Files written whole or not at all."""

from __future__ import annotations

import contextlib
import hashlib
import os
import secrets
from collections.abc import Iterator
from pathlib import Path

_PREFIX = ".misf-"
"""Of temporary files; 16 hexadecimal digits and the target's suffix follow."""


@contextlib.contextmanager
def written_whole(target: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary path beside `target`, with the same suffix; move it onto `target` when the block succeeds.

    When the block fails, the temporary file is removed and an existing target is untouched. A symbolic link is
    followed, the mode of an existing file is kept.

    Raises OSError, always naming the target: no such folder, read-only, disk full; a target that is not a regular file.
    """
    path = Path(os.path.realpath(target))
    if path.exists() and not path.is_file():
        kind = "a folder" if path.is_dir() else "not a regular file"
        raise OSError(f"cannot write {target}: it is {kind}")
    temporary = path.with_name(f"{_PREFIX}{secrets.token_hex(8)}{path.suffix}")
    try:
        # O_EXCL creates it with the user's umask, which tempfile.mkstemp would not.
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
    """Remove what killed processes left in a folder while they were in `written_whole`; nobody else may write there."""
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
