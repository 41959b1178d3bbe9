"""Progress and cancellation of an engine build: a bar fed by TensorRT's progress monitor, and Ctrl-C."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from typing import Any, TypeVar

log = logging.getLogger(__name__)

T = TypeVar("T")
POLL_SECONDS = 0.1


def make_monitor(trt: Any, bar: Any = None) -> Any:
    """Return an IProgressMonitor of module `trt` that updates a rich Progress; its event `cancelled` ends the build."""

    class Monitor(trt.IProgressMonitor):  # type: ignore[misc] # the base comes at run time
        def __init__(self) -> None:
            super().__init__()
            self.cancelled = threading.Event()
            self._tasks: dict[str, Any] = {}
            self._depth: dict[str, int] = {}
            self._lock = threading.Lock()

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            log.debug("phase %s, %d steps", phase_name, num_steps)
            with self._lock:
                self._depth[phase_name] = self._depth.get(parent_phase or "", -1) + 1
                if bar is not None:
                    title = "  " * self._depth[phase_name] + phase_name
                    self._tasks[phase_name] = bar.add_task(title, total=num_steps)

        def step_complete(self, phase_name: str, step: int) -> bool:
            with self._lock:
                if phase_name in self._tasks:
                    bar.update(self._tasks[phase_name], completed=step + 1)
            return not self.cancelled.is_set()

        def phase_finish(self, phase_name: str) -> None:
            with self._lock:
                if phase_name in self._tasks:
                    bar.remove_task(self._tasks.pop(phase_name))

    return Monitor()


def cancellable(work: Callable[[], T], cancelled: threading.Event) -> T:
    """Return work(), run in a thread; an interruption of this thread sets `cancelled` and is raised when work ends.

    TensorRT stays in one call for minutes, during which the main thread would not handle signals.
    """
    results: list[T] = []
    errors: list[BaseException] = []
    interruption: BaseException | None = None

    finished = threading.Event()

    def run() -> None:
        try:
            results.append(work())
        except BaseException as error:
            errors.append(error)
        finally:
            finished.set()

    thread = threading.Thread(target=run, name="misf-build")
    thread.start()
    while not finished.is_set():
        try:
            finished.wait(POLL_SECONDS)  # not thread.join: before Python 3.13 an interrupted join forgets the thread
        except (KeyboardInterrupt, SystemExit) as error:
            if interruption is None:
                log.warning("interrupted: cancelling the build")
            interruption = error
            cancelled.set()
    thread.join()
    if interruption is not None:
        raise interruption
    if errors:
        raise errors[0]
    return results[0]
