"""Which picture goes with which mask and to which output: files and folders turned into a list of jobs."""

from __future__ import annotations

import os
import re
from collections import Counter, defaultdict
from dataclasses import dataclass, replace
from pathlib import Path

from .pictures.image_io import FORMATS, looks_like_picture, written_format

MASK_NAME = re.compile(r"(.+)_mask\d*")  # LaMa's pairs: x.png and x_mask001.png side by side


@dataclass(frozen=True)
class Job:
    """One picture to fill."""

    image: Path
    output: Path
    output_named: bool  # the user named this very file, so it may be overwritten
    relative: Path  # the picture within its folder
    comparison: Path  # where --concat writes
    masks: tuple[Path, ...] = ()  # in the folder of masks, by name: more or less than one is an error of this job

    @property
    def finished(self) -> bool:
        """Whether the output is there: it is written whole or not at all."""
        return self.output.exists() and not _same_file(self.output, self.image)


def plan_jobs(
    image: Path, mask: Path | None, output: Path | None, follow_links: bool = True
) -> tuple[list[Job], list[Path]]:
    """Return a job per picture, those of a folder in the order of their names, and what is skipped.

    Skipped are files because of their suffix, and broken links. Linked folders are followed once, and not at all where
    their pictures are below the folder anyway; without `follow_links` they are skipped.

    Without `output` a file goes to NAME_inpainted.EXT beside it and a folder to IMAGE_inpainted. Raises ValueError
    where no picture is found or the output is of the wrong kind.
    """
    if not image.is_dir():
        job = _single_job(image, output)
        return [job if mask is None else replace(job, masks=MaskIndex(mask).masks(image, job.relative))], []
    folder = output or image.with_name(f"{_real(image).name}_inpainted")
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{image} is a folder and the output {folder} is a file: name a folder")
    pictures, skipped = _pictures(image, mask, folder, follow_links)
    if not pictures:
        raise ValueError(f"{image} holds no pictures: expected files that end in one of {' '.join(FORMATS)}")
    comparisons, index = _comparisons(pictures), None if mask is None else MaskIndex(mask)
    return [
        Job(
            image / path,
            folder / path,
            False,
            path,
            folder / comparisons[path],
            () if index is None else index.masks(image / path, path),
        )
        for path in pictures
    ], skipped


def _single_job(image: Path, output: Path | None) -> Job:
    named = output is not None and not output.is_dir()
    if output is None:
        output = image.with_name(f"{image.stem}_inpainted{image.suffix}")
    elif not named:
        output = output / image.name
    elif not output.parent.is_dir():
        raise ValueError(f"cannot write {output}: there is no folder {output.parent}")
    else:
        written_format(output, image)
    return Job(image, output, named, Path(image.name), output.with_name(f"{output.stem}_concat.png"))


def _comparisons(pictures: list[Path]) -> dict[Path, Path]:
    """Return where each picture's comparison goes: x_concat.png, or x.jpg_concat.png where another is called x too."""
    taken, stems = set(pictures), Counter(path.with_suffix("") for path in pictures)
    found = {}
    for path in pictures:
        stem = path.stem if stems[path.with_suffix("")] == 1 else path.name
        comparison = path.with_name(f"{stem}_concat.png")
        while comparison in taken:
            comparison = comparison.with_name(f"{comparison.stem}_concat.png")
        taken.add(comparison)
        found[path] = comparison
    return found


def find_mask(job: Job, mask: Path) -> Path:
    """Return the mask of a job: `mask` itself if it is a file; in a folder the picture of the same name, with any
    suffix, or with _mask and a number added. ValueError if there is none or more than one."""
    if not mask.is_dir():
        return mask
    stem = job.relative.stem
    if not job.masks:
        folder = mask / job.relative.parent
        raise ValueError(f"no mask for {job.relative}: expected {stem}.* or {stem}_mask*.* in {folder}")
    return single_mask(job.masks, job.relative)


def single_mask(masks: tuple[Path, ...], picture: Path) -> Path:
    """Return the mask that `MaskIndex` found for a picture; ValueError if it found several."""
    if len(masks) > 1:
        names = ", ".join(sorted(path.name for path in masks))
        raise ValueError(f"{len(masks)} masks for {picture}: {names}; expected one")
    return masks[0]


class MaskIndex:
    """The masks below a folder by the pictures' names; every folder is listed once, however many pictures ask."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._listed: dict[Path, tuple[dict[str, list[Path]], dict[str, list[Path]]]] = {}

    def masks(self, image: Path, relative: Path) -> tuple[Path, ...]:
        """Return the masks that fit a picture: those of its name, else those with _mask and a number added."""
        if relative.parent not in self._listed:
            self._listed[relative.parent] = self._list(self._root / relative.parent)
        same, paired = self._listed[relative.parent]
        # Beside the pictures only x_mask.png is a mask of x.jpg: x.png is another picture.
        beside = _same_file(self._root / relative.parent, image.parent)
        found = [] if beside else [path for path in same.get(relative.stem, ()) if not _same_file(path, image)]
        return tuple(found or paired.get(relative.stem, ()))

    @staticmethod
    def _list(folder: Path) -> tuple[dict[str, list[Path]], dict[str, list[Path]]]:
        same: dict[str, list[Path]] = defaultdict(list)
        paired: dict[str, list[Path]] = defaultdict(list)
        if not folder.is_dir():
            return same, paired
        with os.scandir(folder) as entries:
            for entry in entries:
                path = folder / entry.name
                if path.suffix.lower() in FORMATS and entry.is_file():
                    same[path.stem].append(path)
                    if match := MASK_NAME.fullmatch(path.stem):
                        paired[match[1]].append(path)
        return same, paired


def check_output(job: Job, mask: Path | None, concat: bool, force: bool) -> None:
    """Raise ValueError if writing a job's output or comparison would overwrite what the user did not name."""
    if force:
        return
    if concat and job.comparison.exists():
        raise ValueError(f"{job.comparison} exists already: pass --force to overwrite it")
    if not job.output.exists():
        return
    for what, path in (("picture", job.image), ("mask", mask)):
        if path is not None and _same_file(job.output, path):
            raise ValueError(f"the output {job.output} is the {what} itself: name another, or pass --force")
    if not job.output_named:
        raise ValueError(f"{job.output} exists already: pass --force to overwrite it, or --skip-existing to leave it")


def _pictures(image: Path, mask: Path | None, output: Path, follow_links: bool) -> tuple[list[Path], list[Path]]:
    """Return the pictures below a folder, and its other files, relative to it; no hidden ones, no masks, no outputs."""
    root = _real(image)
    apart = [_real(path) for path in (mask, output) if path is not None]
    pairs = mask is not None and mask.is_dir() and _real(mask) == root
    found: list[Path] = []
    others: list[Path] = []
    seen = {root}
    for folder, folders, names in os.walk(image, followlinks=True):
        here = Path(folder)
        entered = []
        for name in sorted(name for name in folders if not name.startswith(".")):
            real = _real(here / name)
            linked = (here / name).is_symlink()
            if real in apart or real in seen or (linked and real.is_relative_to(root)):
                continue
            if linked and not follow_links:
                others.append((here / name).relative_to(image))
                continue
            seen.add(real)
            entered.append(name)
        folders[:] = entered
        for path in (here / name for name in names if not name.startswith(".")):
            is_mask = (pairs and MASK_NAME.fullmatch(path.stem)) or _real(path) in apart
            if not is_mask:
                (found if _is_picture(path) else others).append(path.relative_to(image))
    return sorted(found), sorted(others)


def _real(path: Path) -> Path:
    return Path(os.path.realpath(path))  # Path.resolve raises RuntimeError for a link to itself


def _is_picture(path: Path) -> bool:
    if not path.suffix:
        return path.is_file() and looks_like_picture(path)
    return path.suffix.lower() in FORMATS and path.is_file()


def _same_file(one: Path, other: Path) -> bool:
    return one.exists() and other.exists() and one.samefile(other)
