"""What a run would do and how long it would take, from all masks and one picture filled in memory."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

from ..plugins.shared.progress import Step, duration
from .fill_file import FileFiller
from .folder_run import FAILURES
from .jobs import Job


@dataclass(frozen=True)
class Estimate:
    """What a run would do."""

    pictures: int
    crops: int
    crop_seconds: float
    """Of the model, for a crop of median size."""
    seconds: float
    """Of the whole run, reading and writing included."""
    failures: list[tuple[Job, BaseException]]
    """Pictures whose mask is missing or cannot be read."""

    def to_dict(self) -> dict[str, Any]:
        """Return the numbers, for JSON."""
        return {
            "pictures": self.pictures,
            "crops": self.crops,
            "seconds_per_crop": round(self.crop_seconds, 4),
            "estimated_seconds": round(self.seconds, 3),
            "failures": [{"input": str(job.image), "error": str(error)} for job, error in self.failures],
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
    crops, failures = 0, list[tuple[Job, BaseException]]()
    for number, job in enumerate(jobs, start=1):
        try:
            sizes = filler.crop_sizes(job)
        except FAILURES as error:
            failures.append((job, error))
        else:
            crops += len(sizes)
            areas.append((sum(height * width for height, width in sizes), job))
        step(number, len(jobs))
    by_area = sorted(areas, key=lambda entry: entry[0])
    for area, job in by_area[len(by_area) // 2 :] + by_area[: len(by_area) // 2]:
        try:
            filler.rehearse(job)  # the first call of a model takes longer
            started = time.perf_counter()
            model_seconds, done = filler.rehearse(job)
            whole = time.perf_counter() - started
        except FAILURES:
            continue
        if area:
            model = model_seconds / area * sum(area for area, _ in areas)
            seconds = (model + (whole - model_seconds) * len(areas)) / at_once
            return Estimate(len(areas), crops, model_seconds / done, seconds, failures)
    return Estimate(len(areas), crops, 0.0, 0.0, failures)
