"""Pictures run, one after the other or several at a time, and what becomes of each. Light to import."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import logging
import os
import threading
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..plugins.shared.command import log_about, one_line, print_line
from ..plugins.shared.errors import MisfError
from ..plugins.shared.files import JsonLines
from ..plugins.shared.progress import duration, progress

if TYPE_CHECKING:
    from .fill_file import FileFiller
    from .jobs import Job

log = logging.getLogger(__name__)

FAILURES = (MisfError, ValueError, OSError, MemoryError)
LOOK_SECONDS = 0.2
"""How often a run that has nothing else to do looks whether another has ended its picture."""


@dataclass
class Results:
    """What became of the pictures: kept for --json; on stdout, in the log and in the report as it happens."""

    skipped: list[Path]  # files of the folder that are no pictures
    finished: list[Job]  # by another run
    lines: JsonLines | None = None  # the report
    print_paths: bool = True
    done: list[dict[str, Any]] = field(default_factory=list)
    failures: list[tuple[Job, Exception]] = field(default_factory=list)
    interrupted: bool = False  # the run ended before its last picture

    def __post_init__(self) -> None:
        for path in self.skipped:
            self._report({"input": str(path), "status": "skipped"})
        for job in self.finished:
            self._report_exists(job)

    def add(self, job: Job, record: dict[str, Any]) -> None:
        """Note a picture that is done."""
        self.done.append(record)
        self._report({**record, "status": "done"})
        if self.print_paths:
            print_line(record["output"])
        crops = "1 crop" if record["crops"] == 1 else f"{record['crops']} crops"
        size, seconds = f"{record['width']}x{record['height']}", record["seconds"]
        log.info("%s: %s, %s, %s, %.2f s", job.relative, size, record["strategy"], crops, seconds)

    def fail(self, job: Job, error: Exception) -> None:
        """Note a picture that failed."""
        self.failures.append((job, error))
        self._report({"input": str(job.image), "output": str(job.output), "status": "failed", "error": one_line(error)})

    def leave(self, job: Job) -> None:
        """Note a picture that another run does, or has done meanwhile."""
        self.finished.append(job)
        self._report_exists(job)
        log.info("%s: left to another run", job.relative)

    def _report_exists(self, job: Job) -> None:
        self._report({"input": str(job.image), "output": str(job.output), "status": "exists"})

    def _report(self, record: dict[str, Any]) -> None:
        if self.lines:
            self.lines.append(record)

    def to_dict(self) -> dict[str, Any]:
        """Return what --json tells of them."""
        return {
            "images": self.done,
            "failures": [{"input": str(job.image), "error": one_line(error)} for job, error in self.failures],
            "finished_before": [str(job.output) for job in self.finished],
            "skipped": [str(path) for path in self.skipped],
            "interrupted": self.interrupted,
        }


def run_one(filler: FileFiller, jobs: list[Job], results: Results) -> None:
    """Run the job of a single picture, if there is one."""
    with progress("crops") as step:
        for job in jobs:
            try:
                record = filler.run(job, progress=step)
            except FAILURES as error:
                results.fail(job, error)
            else:
                results.add(job, record)


def run_folder(filler: FileFiller, jobs: list[Job], results: Results, at_once: int, share: bool) -> None:
    """Run the jobs of a folder, `at_once` of them at a time; a failure of one does not stop the others.

    With `share`, pictures that another run is at come last, and are left to it once it has done them. When this run is
    interrupted, each picture at work ends at its next crop without being written, and those that were written are in
    the results.

    Threads share one model. With misf-small on two cores, two of them took 0.60 of the time of one for pictures of
    640x480 and 0.77 for 3000x2000, start included; 0.79 and 0.69 of that of two processes on the same folder.
    """
    begun = time.monotonic()
    interrupted = threading.Event()

    def go_on(_done: int = 0, _total: int = 0) -> None:
        if interrupted.is_set():
            raise KeyboardInterrupt

    def work(job: Job, last: bool) -> dict[str, Any] | None:
        with log_about(f"{job.relative}: "):
            while share:
                with claimed(job.output) as ours:
                    if ours:
                        return None if job.finished else filler.run(job, progress=go_on)
                if not last:
                    return None
                go_on()
                time.sleep(LOOK_SECONDS)
            return filler.run(job, progress=go_on)

    with progress("pictures", len(jobs), lines=True) as step, ThreadPoolExecutor(at_once) as pool:
        waiting = deque((job, False) for job in jobs)
        running: dict[Future[dict[str, Any] | None], tuple[Job, bool]] = {}
        try:
            while waiting or running:
                while waiting and len(running) < at_once:
                    job, last = waiting.popleft()
                    running[pool.submit(work, job, last)] = job, last
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    job, last = running.pop(future)
                    if not last and future.exception() is None and future.result() is None and not job.finished:
                        waiting.append((job, True))  # another run is at it
                    else:
                        _note(results, job, future)
                step(len(jobs) - len(waiting) - len(running))
        except BaseException:
            interrupted.set()
            for future in wait([future for future in running if not future.cancel()]).done:
                failure = future.exception()
                if isinstance(failure, FAILURES) or (failure is None and future.result()):
                    with contextlib.suppress(OSError):  # of stdout or the report, which may be why the run ends
                        _note(results, running[future][0], future)
            raise
    left = f", {len(results.finished)} left as they were" if results.finished else ""
    log.info(
        "%d filled, %d failed%s, in %s",
        *(len(results.done), len(results.failures), left, duration(time.monotonic() - begun)),
    )


def _note(results: Results, job: Job, future: Future[dict[str, Any] | None]) -> None:
    try:
        record = future.result()
    except FAILURES as error:
        text = one_line(error)
        log.error("%s", text if str(job.image) in text else f"{job.relative}: {text}")
        log.debug("the failure in full:", exc_info=True)
        results.fail(job, error)
        return
    if record is None:
        results.leave(job)
    else:
        results.add(job, record)


@contextlib.contextmanager
def claimed(output: Path) -> Iterator[bool]:
    """Yield whether this process may make `output`: no other one that asks so is at it.

    A lock on a hidden file beside the output, which goes with the process, however that ends; the empty file of a
    killed process is removed by the next that claims the same output. Over NFS it holds where the mount has locks;
    where there are none, a warning says so, and the process may.
    """
    import fcntl

    output.parent.mkdir(parents=True, exist_ok=True)
    digest = hashlib.sha256(os.fsencode(output.name)).hexdigest()  # the name itself may be as long as names can be
    path = output.with_name(f".misf-claim-{digest[:32]}")
    with path.open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # Else it was removed between the two calls, by a process that has ended its work: others lock a new one.
            ours = os.path.samestat(os.fstat(file.fileno()), path.stat())
        except (BlockingIOError, FileNotFoundError):
            ours = False
        except OSError as error:
            _warn_of_missing_locks(output.parent, error.strerror)
            ours = True
        try:
            yield ours
        finally:
            if ours:
                path.unlink(missing_ok=True)


@functools.cache
def _warn_of_missing_locks(folder: Path, reason: str) -> None:
    log.warning("no locks in %s (%s): another run on the same folder may do the same pictures again", folder, reason)
