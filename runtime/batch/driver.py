"""Hands entries to workers, as many at a time as keep them busy, and hands them out again when a worker dies.

Ray's actors and futures only. Ray Data was tried: its lists are held in memory by the driver, and its file readers wait
for ever for a processor where the workers have them all.
"""

from __future__ import annotations

import itertools
import logging
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import ray
from ray.exceptions import RayActorError, RayTaskError

from ...plugins.shared.errors import MisfError
from .entries import Entry

log = logging.getLogger(__name__)

CHUNK_SECONDS = 1.0
LARGEST_CHUNK = 64
LOST = 3
"""A picture whose worker died this often has failed: it may be what killed it."""
LOOK_SECONDS = 2.0
"""How often the cluster is asked whether it has grown."""


@dataclass
class _Chunk:
    entries: list[Entry]
    lost: int = 0  # how often a worker died over it


@dataclass
class _Pool:
    """The workers: those that load, those that wait, those that work."""

    start: Callable[[], Any]
    needs: dict[str, float]
    loading: dict[Any, Any] = field(default_factory=dict)  # future -> actor
    idle: list[Any] = field(default_factory=list)
    busy: dict[Any, tuple[Any, _Chunk]] = field(default_factory=dict)  # future -> actor, what it does
    looked: float = -1e9
    deaths: int = 0  # of workers that never got as far as to be ready, in a row

    def grow(self) -> None:
        """Start as many workers as the cluster has room for now."""
        if time.monotonic() - self.looked < LOOK_SECONDS:
            return
        self.looked = time.monotonic()
        free = ray.available_resources()  # type: ignore[no-untyped-call]
        room = int(min(free.get(name, 0.0) / amount for name, amount in self.needs.items()))
        none_yet = not (self.loading or self.idle or self.busy)
        for _ in range(max(room - len(self.loading), 1 if none_yet else 0)):
            actor = self.start()
            self.loading[actor.backend.remote()] = actor

    @property
    def futures(self) -> list[Any]:
        """Everything that is being waited for."""
        return [*self.loading, *self.busy]


def run(
    entries: Iterable[Entry], start: Callable[[], Any], needs: dict[str, float], idle: Callable[[], None] = lambda: None
) -> Iterator[dict[str, Any]]:
    """Yield the record of every entry, as they are done.

    Args:
        entries: read as workers become free, never all at once.
        start: returns a new actor of `Worker`.
        needs: what one takes of the cluster's resources, such as {"CPU": 1}.
        idle: called at least once a second.

    Raises:
        MisfError: a worker cannot load its model.

    """
    stream, again = iter(entries), deque[_Chunk]()
    pool, pace = _Pool(start, needs), _Pace()
    try:
        while True:
            pool.grow()
            while pool.idle and (chunk := _next(again, stream, pace.chunk)):
                actor = pool.idle.pop()
                pool.busy[actor.fill.remote(chunk.entries)] = actor, chunk
            if not pool.busy and pool.idle:
                return
            done, _ = ray.wait(pool.futures, num_returns=1, timeout=1.0)
            idle()
            for future in done:
                if future in pool.loading:
                    _loaded(pool, future)
                    continue
                actor, chunk = pool.busy.pop(future)
                try:
                    records = ray.get(future)
                except (RayActorError, RayTaskError) as error:
                    ray.kill(actor)
                    yield from _lost(chunk, again, error)
                    continue
                pace.add(records)
                pool.idle.append(actor)
                yield from records
    finally:
        for actor in (*pool.loading.values(), *pool.idle, *(actor for actor, _ in pool.busy.values())):
            ray.kill(actor)


class _Pace:
    """How many entries a worker gets at once: about a second's worth."""

    def __init__(self) -> None:
        self.chunk, self._seconds = 1, 0.0

    def add(self, records: list[dict[str, Any]]) -> None:
        """Learn from what a worker did."""
        mean = sum(record.get("seconds", 0.0) for record in records) / max(len(records), 1)
        self._seconds = mean if not self._seconds else 0.8 * self._seconds + 0.2 * mean
        self.chunk = max(1, min(LARGEST_CHUNK, int(CHUNK_SECONDS / max(self._seconds, 1e-3)), 2 * self.chunk))


def _next(again: deque[_Chunk], stream: Iterator[Entry], size: int) -> _Chunk | None:
    if again:
        return again.popleft()
    entries = list(itertools.islice(stream, size))
    return _Chunk(entries) if entries else None


def _loaded(pool: _Pool, future: Any) -> None:
    actor = pool.loading.pop(future)
    try:
        where = ray.get(future)
    except RayActorError as error:
        # What its constructor raised comes wrapped; a node that went away does too.
        cause = getattr(error, "cause", None) or error.__cause__
        text = str(error)
        pool.deaths += 1
        if pool.deaths >= LOST:
            reason = " ".join((str(cause) if cause else text).split())
            raise MisfError(f"no worker could start: {reason[-400:]}") from error
        log.warning("a worker could not start; trying again")
        return
    pool.deaths = 0
    pool.idle.append(actor)
    log.info("a worker is ready (%s), %d in all", where, len(pool.idle) + len(pool.busy))


def _lost(chunk: _Chunk, again: deque[_Chunk], error: Exception) -> Iterator[dict[str, Any]]:
    """Put what a dead worker was at into the queue again, one by one; yield what has been lost too often as failed."""
    log.warning("a worker died (%s); its %d pictures are done again", type(error).__name__, len(chunk.entries))
    for entry in chunk.entries:
        if chunk.lost + 1 < LOST:
            again.append(_Chunk([entry], chunk.lost + 1))
        else:
            text = f"{entry.image}: its worker died {LOST} times"
            yield {"input": entry.image, "output": entry.output, "status": "failed", "error": text}
