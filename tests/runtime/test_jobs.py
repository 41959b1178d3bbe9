"""Folders turned into jobs: links."""

from __future__ import annotations

from pathlib import Path

from misf.runtime.jobs import plan_jobs


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
