"""One request's pictures: decoded within limits, filled and encoded, by its deadline or not at all."""

from __future__ import annotations

import asyncio
import contextvars
import io
import math
import threading
import time
import warnings
from collections.abc import Awaitable, Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from PIL import Image, UnidentifiedImageError

from ...plugins.shared.command import log_about, one_line
from ..inpainter import FillReport, Inpainter
from ..pictures import metadata
from ..pictures.geometry import Mask
from ..pictures.image_io import READABLE, open_mask, open_picture
from ..pictures.masks import MaskSettings
from ..pictures.png16 import SIGNATURE
from ..pictures.settings import CropSettings
from .failures import CLIENT_LEFT, RequestError
from .micro_batching import MicroBatchingBackend, Ticket, ticket_at_work
from .observing import Metrics

Answer = TypeVar("Answer")
PICTURE, MASK = "the picture", "the mask"
MEDIA_TYPES = {name: f"image/{name.lower()}" for name in READABLE}
LARGEST_ORIGINAL = 2048 * 2048
"""Most pixels that the network is given at a time, when a client wants the strategy original."""


MAX_BATCH = 8


@dataclass(frozen=True)
class Filled:
    """A finished picture file and how it came to be."""

    data: bytes
    media_type: str
    width: int
    height: int
    report: FillReport


class Filler:
    """An Inpainter for the requests of a server: a bounded number at a time, decoded within limits, by deadlines.

    Args:
        inpainter: its backend is replaced by one that batches.
        queue: most requests in work or waiting.
        timeout: seconds that each may take.
        max_pixels: of a picture or a mask; pictures of twice as many, with their masks, are decoded at the same time.
        max_batch, batch_delay: see `MicroBatchingBackend`; max_batch None: MAX_BATCH on a GPU, 1 on a CPU.
        metrics: what is counted.

    """

    def __init__(
        self,
        inpainter: Inpainter,
        *,
        queue: int,
        timeout: float,
        max_pixels: int,
        max_batch: int | None,
        batch_delay: float,
        metrics: Metrics,
    ) -> None:
        if max_batch is None:  # measured: on a CPU batches take memory and bring nothing (docs/serving.md)
            max_batch = 1 if inpainter.backend.device == "cpu" else MAX_BATCH
        self.backend = MicroBatchingBackend(inpainter.backend, max_batch, batch_delay, metrics.batch)
        inpainter.backend = self.backend
        self.inpainter, self.metrics = inpainter, metrics
        self._queue, self._timeout, self._max_pixels = queue, timeout, max_pixels
        self._pixels = _Budget(2 * max_pixels)
        self._threads = ThreadPoolExecutor(max_batch + 4, "request")
        self._lock, self._taken = threading.Lock(), 0
        self._seconds = 1.0  # between answers under load, a running mean: for Retry-After

    @property
    def full(self) -> bool:
        """Whether the next request will be refused."""
        return self._taken >= self._queue

    @property
    def ready(self) -> bool:
        """Whether the model runs and the queue has room."""
        return self.backend.alive and not self.full

    def warm_up(self) -> None:
        """Run the model once, at the size that crops have: what a backend prepares is prepared."""
        side = self.inpainter.settings.working_size
        mask = np.zeros((side, side), np.bool_)
        mask[side // 4 : side // 2, side // 4 : side // 2] = True
        self.inpainter(np.zeros((side, side, 3), np.uint8), mask)

    def close(self) -> None:
        """Finish the calls of the model that wait, and take no more."""
        self._threads.shutdown(wait=False, cancel_futures=True)
        self.backend.close()

    async def run(self, receive: Callable[[], Awaitable[Any]], subject: str, work: Callable[[], Answer]) -> Answer:
        """Return what `work` returns, run in a thread within the request's time.

        receive: the ASGI channel of a request whose body has been read; it tells when the client leaves.

        Raises RequestError when the queue is full, the time is over or the client left, and what `work` raises.
        """
        if self.full:
            raise RequestError(503, f"{self._taken} requests wait already: try again", self._retry_after())
        ticket, jobs = Ticket(self._timeout), [work]
        done = self._threads.submit(self._work, ticket, subject, jobs)
        self._change_taken(1)
        done.add_done_callback(self._finished)
        answer: asyncio.Future[Answer] = asyncio.wrap_future(done)
        answer.add_done_callback(_look_at_exception)
        left: asyncio.Future[Any] = asyncio.ensure_future(_until_client_leaves(receive))
        try:
            futures: set[asyncio.Future[Any]] = {answer, left}
            await asyncio.wait(futures, timeout=self._timeout, return_when=asyncio.FIRST_COMPLETED)
            if answer.done():
                return answer.result()
            raise RequestError(CLIENT_LEFT, "the client left") if left.done() else ticket.too_late()
        finally:
            ticket.cancel()
            if done.cancel():
                jobs.clear()  # the pool holds what it was given until a thread is free
            left.cancel()

    def _work(self, ticket: Ticket, subject: str, jobs: list[Callable[[], Answer]]) -> Answer:
        def inside() -> Answer:
            ticket_at_work.set(ticket)
            ticket.check()
            with log_about(f"{subject}: "):
                started = time.monotonic()
                answer = jobs.pop()()
                self._seconds += 0.1 * ((time.monotonic() - started) / max(1, self._taken) - self._seconds)
                return answer

        return contextvars.copy_context().run(inside)

    def _finished(self, _done: Future[Any]) -> None:
        self._change_taken(-1)

    def _change_taken(self, by: int) -> None:
        with self._lock:
            self._taken += by
        self.metrics.in_work.inc(by)

    def _retry_after(self) -> int:
        return max(1, min(60, math.ceil(self._seconds * self._taken)))

    def fill(
        self,
        image: bytes,
        mask: bytes,
        to_hole: Callable[[Image.Image], Mask],
        settings: CropSettings,
        masks: MaskSettings,
    ) -> Filled:
        """Return the picture in `image` with its holes filled, in its own format.

        to_hole: makes the hole of the mask's picture, at its own size.

        Raises RequestError (400, 413, 415, 503, 504), ValueError for what is damaged, MisfError when the model fails.
        """
        pixels = declared_pixels(image, PICTURE, self._max_pixels)
        if settings.strategy == "original" and pixels > LARGEST_ORIGINAL:
            raise RequestError(413, f"{pixels} pixels are too many for the strategy original: take auto")
        ticket = ticket_at_work.get()
        with self._pixels.reserved(max(pixels, declared_pixels(mask, MASK, self._max_pixels)), ticket):
            picture, hole = open_picture(Path(PICTURE), data=image), to_hole(open_mask(Path(MASK), data=mask))
            if hole.shape != picture.canvas.size and not masks.resize:
                raise RequestError(400, _sizes_differ(hole.shape, picture.canvas.size))
            report = self.inpainter.fill(
                picture.canvas,
                masks.fitted(hole, picture.canvas.size),
                lambda _done, _all: ticket.check() if ticket else None,
                settings=settings,
                feather=masks.feather,
            )
            data = picture.encoded(picture.format, changed=report.hole_pixels > 0)
        height, width = picture.canvas.size
        self.metrics.hole_share.observe(report.hole_pixels / (height * width))
        return Filled(data, MEDIA_TYPES[picture.format], width, height, report)

    def with_mask(self, data: bytes, use: Callable[[Image.Image], Answer]) -> Answer:
        """Return what `use` makes of a mask's picture. Raises RequestError or ValueError, as `fill`."""
        with self._pixels.reserved(declared_pixels(data, MASK, self._max_pixels), ticket_at_work.get()):
            return use(open_mask(Path(MASK), data=data))


def declared_pixels(data: bytes, what: str, limit: int) -> int:
    """Return how many pixels a picture file says it has, nothing decoded.

    Raises RequestError: 413 for more than `limit`, 415 for what is no picture, 422 for one whose head is damaged.
    """
    if not data:
        raise RequestError(422, f"{what} is empty: expected a picture file")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            shown = metadata.png_for_decoder(data) if data.startswith(SIGNATURE) else data
            with Image.open(io.BytesIO(shown), formats=READABLE) as image:
                width, height = image.size
    except MemoryError:
        raise
    except Image.DecompressionBombError:
        raise RequestError(413, f"{what} is too large: expected at most {limit} pixels") from None
    except UnidentifiedImageError:
        known = "PNG, JPEG, WebP, TIFF, BMP, GIF or AVIF"
        raise RequestError(415, f"{what} is not a picture we can read: expected {known}") from None
    except Exception as error:  # each decoder has its own
        raise RequestError(422, f"{what} is damaged: {one_line(error)}") from None
    if width * height > limit:
        raise RequestError(413, f"{what} is {width}x{height}: expected at most {limit} pixels")
    return width * height


class _Budget:
    """Pixels that are decoded at the same time; who wants more than is left waits, in the order of arrival."""

    def __init__(self, pixels: int) -> None:
        self._left = pixels
        self._turn = threading.Lock()
        self._changed = threading.Condition()

    @contextmanager
    def reserved(self, pixels: int, ticket: Ticket | None) -> Iterator[None]:
        """Hold so many pixels inside the block. Raises RequestError when the ticket ends before they are free."""
        with self._turn, self._changed:
            while pixels > self._left:
                if ticket:
                    ticket.check()
                self._changed.wait(0.2)
            self._left -= pixels
        try:
            yield
        finally:
            with self._changed:
                self._left += pixels
                self._changed.notify()


def _sizes_differ(mask: tuple[int, ...], picture: tuple[int, int]) -> str:
    return (
        f"the mask is {mask[1]}x{mask[0]} and the picture {picture[1]}x{picture[0]} (width x height): "
        "give a mask of the size at which the picture is displayed"
    )


async def _until_client_leaves(receive: Callable[[], Awaitable[Any]]) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def _look_at_exception(answer: asyncio.Future[Any]) -> None:
    """Keep asyncio from reporting the exception of a request whose client is gone."""
    if not answer.cancelled():
        answer.exception()
