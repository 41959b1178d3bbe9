"""A backend that runs calls of equal shape together: threads call it as they would call the backend itself."""

from __future__ import annotations

import contextvars
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import CancelledError, Future
from concurrent.futures import TimeoutError as FutureTimeout
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from ...plugins.shared.errors import MisfError
from ..memory import available_bytes, least_bytes
from .failures import CLIENT_LEFT, RequestError

if TYPE_CHECKING:
    from ..backends.contract import Backend, Tensor
    from ..engines.side_car import Limits

ROOM = 4
"""A batch may need at least a quarter of the free memory: what it really needs is up to twice the least."""


class Ticket:
    """One request's right to go on: until its deadline, or until its client leaves. Threads may share it."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self._deadline = time.monotonic() + seconds
        self._cancelled = False
        self._waits_for: Future[Any] | None = None

    @property
    def seconds_left(self) -> float:
        """0 when the deadline has passed."""
        return max(0.0, self._deadline - time.monotonic())

    def cancel(self) -> None:
        """End the request at its next step; a call that waits for the model does not reach it any more."""
        self._cancelled = True
        if (waited_for := self._waits_for) is not None:
            waited_for.cancel()

    def check(self) -> None:
        """Raise RequestError when the request is not wanted any more."""
        if self._cancelled:
            raise RequestError(CLIENT_LEFT, "the client left")
        if not self.seconds_left:
            raise self.too_late()

    def result(self, future: Future[Tensor]) -> Tensor:
        """Return the future's result. Raises RequestError when the ticket ends first."""
        self._waits_for = future
        try:
            self.check()
            return future.result(self.seconds_left)
        except (CancelledError, FutureTimeout):
            self.check()
            raise self.too_late() from None
        finally:
            future.cancel()
            self._waits_for = None

    def too_late(self) -> RequestError:
        """Return the failure of a request that was not finished by its deadline."""
        return RequestError(504, f"not finished within {self.seconds:g} s: send a smaller picture, or try again later")


ticket_at_work: contextvars.ContextVar[Ticket | None] = contextvars.ContextVar("ticket_at_work", default=None)
"""The ticket of the request that this thread works for."""


@dataclass
class _Call:
    image: Tensor
    mask: Tensor
    answer: Future[Tensor] = field(default_factory=Future)
    arrived: float = field(default_factory=time.monotonic)


class MicroBatchingBackend:
    """Fits `Backend` and is called by many threads; one thread of its own runs the model.

    A call waits for at most `delay` seconds for others of its shape, and no longer than until the model is free; the
    oldest call decides which shape is next. The results are those of single calls: as near as the backend's own batches
    are, which on ONNX Runtime's CPU provider is equal to the bit.

    Args:
        backend: the one that runs.
        max_batch: most calls in a batch; 1 runs each alone. An engine's own limit and the free memory bound it too.
        delay: seconds.
        on_batch: called with the size of each batch and the seconds it took.

    """

    def __init__(
        self,
        backend: Backend,
        max_batch: int = 8,
        delay: float = 0.003,
        on_batch: Callable[[int, float], None] = lambda _size, _seconds: None,
    ) -> None:
        self._backend, self._delay, self._on_batch = backend, delay, on_batch
        self.name, self.device, self.precision = backend.name, backend.device, backend.precision
        self.multiple, self.file_precision = backend.multiple, backend.file_precision
        self.config, self.checkpoint_sha256 = backend.config, backend.checkpoint_sha256
        self.limits: Limits | None = backend.limits
        self._max_batch = max_batch if self.limits is None else min(max_batch, self.limits.max[0])
        self._calls: deque[_Call] = deque()
        self._changed = threading.Condition()
        self._closed = self._broken = False
        self._known: tuple[Tensor, Tensor] | None = None  # a call that the model once answered
        self._thread = threading.Thread(target=self._run, name="model", daemon=True)
        self._thread.start()

    def __call__(self, image: Tensor, mask: Tensor) -> Tensor:
        """Return the finished picture, float32 1,3,H,W. Shapes as in `Backend`, N = 1.

        Raises RequestError when the ticket of this thread's request ends first, else what the backend raises.
        """
        if len(image) != 1:
            raise ValueError(f"expected one picture a call, got a batch of {len(image)}")
        call = _Call(image, mask)
        with self._changed:
            if self._closed:
                raise RequestError(503, "the server is shutting down: try again", 1)
            self._calls.append(call)
            self._changed.notify()
        ticket = ticket_at_work.get()
        return call.answer.result() if ticket is None else ticket.result(call.answer)

    @property
    def alive(self) -> bool:
        """Whether calls are still answered, and the model did not fail at what it once did."""
        return self._thread.is_alive() and not self._closed and not self._broken

    def close(self) -> None:
        """Answer the calls that wait and end the thread."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join()

    def _run(self) -> None:
        while batch := self._next_batch():
            if batch := [call for call in batch if call.answer.set_running_or_notify_cancel()]:
                started = time.perf_counter()
                self._answer(batch)
                self._on_batch(len(batch), time.perf_counter() - started)

    def _next_batch(self) -> list[_Call]:
        """Return calls of the oldest one's shape, in the order of arrival; none when the backend is closed."""
        with self._changed:
            while True:
                while self._calls and self._calls[0].answer.cancelled():
                    self._calls.popleft()
                if not self._calls:
                    if self._closed:
                        return []
                    self._changed.wait()
                    continue
                oldest = self._calls[0]
                same = [call for call in self._calls if call.image.shape == oldest.image.shape]
                wait = oldest.arrived + self._delay - time.monotonic()
                if self._closed or wait <= 0 or len(same) >= self._max_batch:
                    break
                self._changed.wait(wait)
        batch = same[: self._affordable(oldest.image.shape)]
        with self._changed:
            taken = set(map(id, batch))
            self._calls = deque(call for call in self._calls if id(call) not in taken)
        return batch

    def _affordable(self, shape: tuple[int, ...]) -> int:
        """Return how many pictures of a shape fit into one batch."""
        if self._max_batch == 1:
            return 1
        each, free = least_bytes(self.config, self.precision, (shape[2], shape[3])), available_bytes()
        if self.device != "cpu" or free is None or not each:
            return self._max_batch
        return max(1, min(self._max_batch, free // (ROOM * each)))

    def _answer(self, batch: list[_Call]) -> None:
        try:
            images = np.concatenate([call.image for call in batch])
            output = self._backend(images, np.concatenate([call.mask for call in batch]))
            if output.shape != images.shape:
                raise MisfError(f"the model returned the shape {output.shape} for pictures of {images.shape}")
        except BaseException as error:  # whatever it is, it belongs to the callers; the thread lives on
            if len(batch) == 1:
                self._broken = self._fails_at_all()
                batch[0].answer.set_exception(error)
            else:
                for call in batch:  # one of them may be at fault, or all together were too large
                    self._answer([call])
            return
        self._broken = False
        if self._known is None:
            self._known = batch[0].image, batch[0].mask
        for number, call in enumerate(batch):
            call.answer.set_result(output[number : number + 1])

    def _fails_at_all(self) -> bool:
        """Return whether the model fails at a known call too: after some errors a GPU fails until its process ends."""
        if self._known is None:
            return True
        try:
            self._backend(*self._known)
        except BaseException:
            return True
        return False
