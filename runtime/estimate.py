"""What a run would do and how long it would take, from all masks and one picture filled in memory."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

from ..plugins.shared.command import log_about, one_line
from ..plugins.shared.progress import Step, duration
from .fill_file import FileFiller
from .folder_run import FAILURES
from .inpainter import FillReport
from .jobs import Job

QUICK = 5.0
"""Seconds; a picture that takes longer is timed by its first run, however cold the model was."""


@dataclass(frozen=True)
class Estimate:
    """What a run would do."""

    pictures: int
    crops: int
    crop_seconds: float
    """Of the model, for a crop of median size."""
    seconds: float
    """Of the whole run, reading and writing included."""
    failures: list[tuple[Job, Exception]]
    """Pictures that are known to fail: without a mask, with an output that exists, and so on."""

    def to_dict(self) -> dict[str, Any]:
        """Return the numbers, for JSON."""
        return {
            "pictures": self.pictures,
            "crops": self.crops,
            "seconds_per_crop": round(self.crop_seconds, 4),
            "estimated_seconds": round(self.seconds, 3),
            "failures": [{"input": str(job.image), "error": one_line(error)} for job, error in self.failures],
        }

    def text(self, where: str) -> str:
        """Return a sentence."""
        pictures, crops = (
            f"{count} {name}{'' if count == 1 else 's'}"
            for count, name in ((self.pictures, "picture"), (self.crops, "crop"))
        )
        return f"{pictures}, {crops}: about {duration(self.seconds)} ({where})"


def estimate(filler: FileFiller, jobs: list[Job], at_once: int, step: Step) -> Estimate:
    """Return what running the jobs would take, `at_once` pictures at a time.

    The masks say which crops there are. One picture, with the crops that are the median, is filled in memory: its time
    is that of its crops, by area, and that of reading and writing a picture.
    """
    areas: list[tuple[int, Job]] = []
    crops, failures = 0, list[tuple[Job, Exception]]()
    for number, job in enumerate(jobs, start=1):
        try:
            with log_about(f"{job.relative}: "):
                sizes = filler.crop_sizes(job)
        except FAILURES as error:
            failures.append((job, error))
        else:
            crops += len(sizes)
            areas.append((sum(height * width for height, width in sizes), job))
        step(number, len(jobs))
    # The median of those with a hole first; the others, should it turn out to be damaged.
    by_area = sorted(areas, key=lambda entry: entry[0])
    middle = len(by_area) - sum(area > 0 for area, _ in areas) // 2 - 1
    for area, job in by_area[middle:] + by_area[:middle]:
        try:
            seconds, report = _timed(filler, job)
            if seconds < QUICK:  # the first call of a model takes longer
                seconds, report = _timed(filler, job)
        except FAILURES:
            continue
        model_seconds = report.model_seconds / max(area, 1) * sum(area for area, _ in areas)
        whole = model_seconds + (seconds - report.model_seconds) * len(areas)
        return Estimate(len(areas), crops, report.model_seconds / max(report.crops, 1), whole / at_once, failures)
    return Estimate(len(areas), crops, 0.0, 0.0, failures)


def _timed(filler: FileFiller, job: Job) -> tuple[float, FillReport]:
    started = time.perf_counter()
    report = filler.rehearse(job)
    return time.perf_counter() - started, report
