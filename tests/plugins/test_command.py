"""The features of all commands."""

from __future__ import annotations

import importlib.metadata
import os
import re
import subprocess
import sys
from pathlib import Path
from urllib.parse import quote

import pytest

from misf.plugins.shared.extras import pip_install

PROGRAM = """
import os, sys
from misf.plugins.shared.command import command

@command("misf-thing")
def main():
    assert "torch" not in sys.modules
    print(os.environ["OMP_WAIT_POLICY"])

main()
"""


@pytest.mark.parametrize(("own", "expected"), [(None, "PASSIVE"), ("ACTIVE", "ACTIVE")])
def test_threads_that_wait_do_not_spin_unless_the_user_says_so(own: str | None, expected: str) -> None:
    env = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"}
    env |= {"OMP_WAIT_POLICY": own} if own else {}
    done = subprocess.run([sys.executable, "-c", PROGRAM], env=env, capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == expected, done.stderr


def test_no_command_loads_pytorch_before_its_body_runs() -> None:
    """Otherwise the setting would come too late."""
    pyproject = (Path(__file__).parents[2] / "pyproject.toml").read_text(encoding="utf-8")
    commands = re.findall(r'^misf-\w+ = "(.*):main"$', pyproject, re.MULTILINE)
    assert len(commands) >= 8
    program = f"import sys, {', '.join(commands)}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], timeout=60).returncode == 0


SPEAKING = """
import click, logging
from misf.plugins.shared.command import command
@command("speak")
def main():
    logging.getLogger("misf").info("to stderr")
    print("caf\\udce9 \\u6771")
main()
"""


def test_stdout_gets_the_bytes_of_any_name_and_a_closed_stderr_nothing() -> None:
    environment = {**os.environ, "PYTHONIOENCODING": "latin-1:strict"}
    line = '"$0" -c "$1" 2>&-'
    result = subprocess.run(["sh", "-c", line, sys.executable, SPEAKING], env=environment, capture_output=True)
    assert (result.returncode, result.stdout) == (0, b"caf\xe9 \xe6\x9d\xb1\n")


def test_training_without_pytorch_is_one_line_that_names_the_extra(tmp_path: Path) -> None:
    """As with only the base installed: torch cannot be found."""
    program = """
import importlib.util, sys
find = importlib.util.find_spec
importlib.util.find_spec = lambda name, package=None: None if name == "torch" else find(name, package)
sys.modules["torch"] = None
from misf.training.train_cli import main
main(["--data", sys.argv[1], "--output", sys.argv[1] + "/run"])
"""
    done = subprocess.run([sys.executable, "-c", program, str(tmp_path)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 4, done.stderr
    assert re.fullmatch(
        r"misf-train: misf-train needs torch, which is not installed: pip install .*\[train\]'\n", done.stderr
    )


@pytest.mark.parametrize(
    ("recorded", "command"),
    [
        ('{"dir_info": {"editable": true}, "url": "file://%s"}', "pip install -e '%s[cpu]'"),
        ('{"dir_info": {}, "url": "file://%s"}', "pip install '%s[cpu]'"),
        ('{"dir_info": {}, "url": "file:///gone"}', "pip install 'misf[cpu]'"),
        ('{"archive_info": {}, "url": "file://%s/misf.whl"}', "pip install 'misf[cpu]'"),
        ("{", "pip install 'misf[cpu]'"),
        (None, "pip install 'misf[cpu]'"),
    ],
)
def test_an_extra_is_installed_from_where_misf_came(
    recorded: str | None, command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As recorded by pip (PEP 610); a space in the folder's name is quoted in the URL."""
    folder = tmp_path / "my misf"
    folder.mkdir()
    (folder / "pyproject.toml").touch()
    text = recorded and recorded.replace("%s", quote(str(folder)))
    monkeypatch.setattr(importlib.metadata.Distribution, "read_text", lambda *_: text)
    monkeypatch.setattr(importlib.metadata.PathDistribution, "read_text", lambda *_: text)
    assert pip_install("cpu") == command.replace("%s", str(folder))
