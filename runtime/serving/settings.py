"""Every option of a server, as one value that worker processes can be given. Light to import."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path

VARIABLE = "MISF_SERVE_SETTINGS"
TOKEN_VARIABLE = "MISF_SERVE_TOKEN"
LOOPBACK = ("127.0.0.1", "localhost", "::1")
PAGE = Path(__file__).parent / "page"


@dataclass(frozen=True)
class ServerSettings:
    """What misf-serve was started with. Sizes are in bytes and pixels, times in seconds."""

    model: str
    backend: str = "auto"
    device: str | None = None
    precision: str = "auto"
    working_size: int | None = None
    threads: int | None = None
    queue: int = 64
    """Requests that are in work or wait for it; one more gets 503."""
    max_batch: int | None = None
    batch_delay: float = 0.003
    timeout: float = 60.0
    """From the last byte of a request to its answer; the body itself may take as long again."""
    max_bytes: int = 64 << 20
    max_pixels: int = 50_000_000
    cors: tuple[str, ...] = ()
    hosts: tuple[str, ...] = ()
    """Host names that a request may be for; none: any."""
    token: str = ""
    page: str = str(PAGE)
    json_logs: bool = False

    def to_environment(self) -> None:
        """Write the settings to this process's environment, where worker processes read them."""
        values = asdict(self)
        os.environ[TOKEN_VARIABLE] = values.pop("token")
        os.environ[VARIABLE] = json.dumps(values)

    @classmethod
    def from_environment(cls) -> ServerSettings:
        """Return the settings that the parent process wrote."""
        values = json.loads(os.environ[VARIABLE])
        values |= {name: tuple(values[name]) for name in ("cors", "hosts")}
        return cls(**values, token=os.environ.get(TOKEN_VARIABLE, ""))
