"""Reports are whole lines, whatever happened to the file before."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
from pathlib import Path

import pytest

from misf.plugins.shared.files import JsonLines, folder_written_whole


def test_a_folder_is_replaced_whole_or_not_at_all(tmp_path: Path) -> None:
    target = tmp_path / "new" / "folder"
    with folder_written_whole(target) as temporary:
        (temporary / "one").write_text("1")
        assert not target.exists()
    with pytest.raises(ZeroDivisionError), folder_written_whole(target) as temporary:
        (temporary / "two").write_text(str(2 / 0))
    assert [path.name for path in target.iterdir()] == ["one"]
    with folder_written_whole(target) as temporary:
        (temporary / "two").write_text("2")
    assert [path.name for path in target.iterdir()] == ["two"]
    with pytest.raises(OSError, match="two: it is not a folder"), folder_written_whole(target / "two"):
        pass
    assert [path.name for path in tmp_path.rglob("*")] == ["new", "folder", "two"]  # nothing temporary is left
    for here in (target, target.parent):
        with (
            contextlib.chdir(target),
            pytest.raises(OSError, match="the working folder is in it"),
            folder_written_whole(here),
        ):
            pass


def test_records_are_appended_as_lines_and_a_line_cut_off_stays_by_itself(tmp_path: Path) -> None:
    report = tmp_path / "report.jsonl"
    for number in range(2):
        with JsonLines(report) as lines:
            lines.append({"number": number, "name": "ä\udcff\n"})
    before = report.read_text()
    assert [json.loads(line)["number"] for line in before.splitlines()] == [0, 1]
    report.write_text(before + '{"number": 2, "na')
    with JsonLines(report) as lines:
        lines.append({"number": 3})
    assert report.read_text() == before + '{"number": 2, "na\n{"number": 3}\n'


def test_a_full_disk_leaves_whole_lines(tmp_path: Path) -> None:
    """A limit on the size of files ends a write in its middle, as a full disk does."""
    code = """
import resource, sys
from misf.plugins.shared.files import JsonLines
resource.setrlimit(resource.RLIMIT_FSIZE, (50, 50))
with JsonLines(sys.argv[1]) as lines:
    for _ in range(9):
        lines.append({"number": 12345})
"""
    report = tmp_path / "report.jsonl"
    done = subprocess.run([sys.executable, "-c", code, report], stderr=subprocess.PIPE, text=True, timeout=60)
    assert f"cannot write {report}: No space left on device" in done.stderr
    assert report.read_text() == '{"number": 12345}\n' * 2


def test_a_folder_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(OSError, match=r"cannot write .*nowhere/report\.jsonl: No such file"):
        JsonLines(tmp_path / "nowhere/report.jsonl")
