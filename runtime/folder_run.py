"""A folder's pictures, one after the other or several at a time. Light to import."""

from __future__ import annotations

import contextlib
import json
import logging
import time
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import click

from ..plugins.shared.command import log_about, one_line
from ..plugins.shared.errors import MisfError
from ..plugins.shared.progress import duration, progress

if TYPE_CHECKING:
    from .fill_file import FileFiller
    from .jobs import Job

log = logging.getLogger(__name__)

FAILURES = (MisfError, ValueError, OSError, MemoryError)


@dataclass
class Results:
    """What became of the pictures."""

    skipped: list[Path]  # files of the folder that are no pictures
    finished: list[Job]  # by an earlier run
    done: list[dict[str, Any]] = field(default_factory=list)
    failures: list[tuple[Job, Exception]] = field(default_factory=list)
    interrupted: bool = False  # the run ended before its last picture

    def to_dict(self) -> dict[str, Any]:
        """Return what --json tells of them."""
        return {
            "images": self.done,
            "failures": [{"input": str(job.image), "error": one_line(error)} for job, error in self.failures],
            "finished_before": [str(job.output) for job in self.finished],
            "skipped": [str(path) for path in self.skipped],
            "interrupted": self.interrupted,
        }


def run_one(filler: FileFiller, jobs: list[Job], results: Results, lines: IO[str] | None, print_path: bool) -> None:
    """Run the job of a single picture, if there is one."""
    with progress("crops") as step:
        for job in jobs:
            try:
                record = filler.run(job, progress=step)
            except FAILURES as error:
                results.failures.append((job, error))
                _write_line(lines, _failed(job, error))
            else:
                results.done.append(record)
                _write_line(lines, {**record, "status": "done"})
                _tell(job, record, print_path)


class FolderRun:
    """Runs the jobs of a folder.

    Threads share one model. With misf-small on two busy cores two at a time took a third to a half less time than one,
    and two processes, which load a model each, were not faster than that.

    Args:
        filler: what fills a picture.
        results: what becomes of each picture is added as it is done.
        at_once: how many pictures to work on at a time.
        lines: where each picture gets a line of JSON.
        print_paths: print the path of each result.

    """

    def __init__(self, filler: FileFiller, results: Results, at_once: int, lines: IO[str] | None, print_paths: bool):
        self._filler, self._results, self._at_once = filler, results, at_once
        self._lines, self._print_paths = lines, print_paths
        for job in results.finished:
            _write_line(lines, _exists(job))

    def __call__(self, jobs: list[Job], share: bool) -> None:
        """Run the jobs; with `share`, leave those to another run that it is doing or has done meanwhile."""
        begun = time.monotonic()
        with progress("pictures", len(jobs), lines=True) as step, ThreadPoolExecutor(self._at_once) as pool:
            waiting = iter(jobs)
            running: dict[Future[dict[str, Any] | None], Job] = {}
            try:
                for number in range(len(jobs)):
                    while len(running) < self._at_once and (job := next(waiting, None)):
                        running[pool.submit(self._run, job, share)] = job
                    done, _ = wait(running, return_when=FIRST_COMPLETED)
                    first = next(iter(done))
                    self._add(running.pop(first), first)
                    step(number + 1, len(jobs))
            finally:
                for future in running:
                    future.cancel()
        filled, failed = len(self._results.done), len(self._results.failures)
        left = f", {len(self._results.finished)} left as they were" if self._results.finished else ""
        log.info("%d filled, %d failed%s, in %s", filled, failed, left, duration(time.monotonic() - begun))

    def _run(self, job: Job, share: bool) -> dict[str, Any] | None:
        """Return what was done, or None where another run does it."""
        with log_about(f"{job.relative}: "):
            if not share:
                return self._filler.run(job)
            with claimed(job.output) as ours:
                return self._filler.run(job) if ours and not job.finished else None

    def _add(self, job: Job, future: Future[dict[str, Any] | None]) -> None:
        try:
            record = future.result()
        except FAILURES as error:
            self._results.failures.append((job, error))
            _write_line(self._lines, _failed(job, error))
            text = one_line(error)
            log.error("%s", text if str(job.image) in text else f"{job.relative}: {text}")
            log.debug("the failure in full:", exc_info=True)
            return
        if record is None:
            log.info("%s: left to another run", job.relative)
            self._results.finished.append(job)
            _write_line(self._lines, _exists(job))
            return
        self._results.done.append(record)
        _write_line(self._lines, {**record, "status": "done"})
        _tell(job, record, self._print_paths)


@contextlib.contextmanager
def claimed(output: Path) -> Iterator[bool]:
    """Yield whether this process may make `output`: no other one that asks so is at it.

    A lock on a hidden file beside the output, which goes with the process, however that ends; the empty file of a
    killed process is removed by the next that claims the same output. Over NFS it holds where the mount has locks.
    """
    import fcntl

    output.parent.mkdir(parents=True, exist_ok=True)
    path = output.with_name(f".misf-claim-{output.name}")
    with path.open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        try:
            yield True
        finally:
            path.unlink(missing_ok=True)


def _failed(job: Job, error: BaseException) -> dict[str, Any]:
    return {"input": str(job.image), "output": str(job.output), "status": "failed", "error": one_line(error)}


def _exists(job: Job) -> dict[str, Any]:
    return {"input": str(job.image), "output": str(job.output), "status": "exists"}


def _write_line(lines: IO[str] | None, record: dict[str, Any]) -> None:
    if lines:
        try:
            lines.write(json.dumps(record) + "\n")
            lines.flush()
        except OSError as error:
            raise OSError(f"cannot write the report {lines.name}: {error.strerror}") from error


def _tell(job: Job, record: dict[str, Any], print_path: bool) -> None:
    if print_path:
        click.echo(record["output"])
    log.info(
        "%s: %dx%d, %s, %d %s, %.2f s",
        job.relative,
        record["width"],
        record["height"],
        record["strategy"],
        record["crops"],
        "crop" if record["crops"] == 1 else "crops",
        record["seconds"],
    )
