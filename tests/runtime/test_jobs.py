"""Which picture goes with which mask."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from misf.runtime.jobs import find_mask, plan_jobs


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    images, masks = tmp_path / "images", tmp_path / "masks"
    for folder in (images, masks):
        folder.mkdir()
    return images, masks


def test_eight_thousand_pictures_with_masks_are_planned_in_a_moment(folders: tuple[Path, Path]) -> None:
    images, masks = folders
    for number in range(8000):
        (images / f"{number}.jpg").touch()
        (masks / f"{number}.png").touch()
    started = time.process_time()
    jobs, _ = plan_jobs(images, masks, None)
    found = [find_mask(job, masks) for job in jobs]
    assert time.process_time() - started < 2  # half an hour when each picture listed all masks
    assert [path.name for path in found] == [f"{job.image.stem}.png" for job in jobs]


def test_a_mask_is_found_by_name_or_the_job_says_what_is_wrong(folders: tuple[Path, Path]) -> None:
    images, masks = folders
    for name in ("a.jpg", "b.jpg", "c.jpg", "d.jpg"):
        (images / name).touch()
    for name in ("a.png", "a_mask001.png", "b_mask2.png", "c.png", "c.bmp"):
        (masks / name).touch()
    a, b, c, d = plan_jobs(images, masks, None)[0]
    assert find_mask(a, masks).name == "a.png"
    assert find_mask(b, masks).name == "b_mask2.png"
    with pytest.raises(ValueError, match=r"2 masks for c\.jpg: c\.bmp, c\.png"):
        find_mask(c, masks)
    with pytest.raises(ValueError, match=r"no mask for d\.jpg: expected d\.\* or d_mask\*\.\*"):
        find_mask(d, masks)


def test_linked_folders_are_followed_once_and_never_in_a_circle(tmp_path: Path) -> None:
    inside, outside = tmp_path / "in", tmp_path / "elsewhere"
    for folder in (inside / "sub", outside):
        folder.mkdir(parents=True)
        (folder / f"{folder.name}.png").touch()
    (inside / "a").symlink_to(outside)
    (inside / "b").symlink_to(outside)
    (inside / "again").symlink_to(inside / "sub")
    (outside / "circle").symlink_to(inside)
    jobs, skipped = plan_jobs(inside, None, tmp_path / "out")
    assert [str(job.relative) for job in jobs] == ["a/elsewhere.png", "sub/sub.png"]
    assert skipped == []
    jobs, skipped = plan_jobs(inside, None, tmp_path / "out", follow_links=False)
    assert [str(job.relative) for job in jobs] == ["sub/sub.png"]
    assert [str(path) for path in skipped] == ["a", "b"]


def test_a_link_to_itself_is_left_out(tmp_path: Path) -> None:
    (tmp_path / "self").symlink_to("self")
    (tmp_path / "self.png").symlink_to("self.png")
    (tmp_path / "x.png").touch()
    jobs, skipped = plan_jobs(tmp_path, None, None)
    assert [str(job.relative) for job in jobs] == ["x.png"]
    assert skipped == [Path("self"), Path("self.png")]


def test_beside_the_pictures_only_a_name_with_mask_is_a_mask(tmp_path: Path) -> None:
    """x.jpg and x.png are two pictures with one mask; neither is the other's."""
    for name in ("x.jpg", "x.png", "x_mask001.png"):
        (tmp_path / name).write_bytes(b"")
    jobs, _ = plan_jobs(tmp_path, tmp_path, tmp_path / "out")
    assert {job.relative.name: [path.name for path in job.masks] for job in jobs} == {
        "x.jpg": ["x_mask001.png"],
        "x.png": ["x_mask001.png"],
    }
