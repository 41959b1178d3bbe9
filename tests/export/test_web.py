"""misf-export --web: a whole folder or nothing, from npm's package or one that is there already."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import onnx
import pytest
from click.testing import CliRunner, Result

from misf.export.export_cli import main
from misf.export.web import SCRIPT, WASM
from misf.plugins.shared.shipped import shipped_model

from ..support.tiny_models import foreign


@pytest.fixture
def package(tmp_path: Path) -> Path:
    """What an unpacked onnxruntime-web has of what we take."""
    folder = tmp_path / "package"
    (folder / "dist").mkdir(parents=True)
    (folder / "package.json").write_text('{"name": "onnxruntime-web", "version": "1.30.0"}')
    (folder / SCRIPT).write_text("export const env = {};")
    (folder / WASM).write_bytes(b"\0asm" * 1000)
    return folder


def export(*arguments: str | Path) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def test_a_folder_has_the_page_the_network_and_what_runs_it(tmp_path: Path, package: Path) -> None:
    site = tmp_path / "new" / "site"
    result = export("--onnx", "misf-small", "--web", site, "--onnxruntime-web", package, "--json")
    assert result.exit_code == 0, result.output
    assert (site / "network.onnx").read_bytes() == shipped_model("misf-small").read_bytes()
    assert gzip.decompress((site / "ort/ort.wasm.gz").read_bytes()) == (package / WASM).read_bytes()
    assert "Permission is hereby granted" in (site / "ort/LICENSE").read_text()
    assert (site / "ort/ThirdPartyNotices.txt").stat().st_size > 1000
    page = json.loads((site / "page.json").read_text())
    metadata = {entry.key: entry.value for entry in onnx.load(site / "network.onnx").metadata_props}
    assert page["server"] is False
    assert page["network"] == json.loads(result.stdout)["network"]
    assert page["network"]["precision"] == metadata["misf.precision"] == "fp16"
    assert page["network"]["checkpoint_sha256"] == metadata["misf.checkpoint_sha256"]
    assert page["network"]["working_size"] == 512
    assert page["network"]["multiple"] == 16  # misf-small fills smoothly first, at a sixteenth
    for name in (page["network"]["file"], *(page["network"]["runtime"][key] for key in ("script", "wasm"))):
        assert (site / name).is_file()
    for name in ("index.html", "style.css", "service-worker.js", "js/app.js", "samples/astronaut.jpg"):
        assert (site / name).is_file()
    assert sorted(path.name for path in site.parent.iterdir()) == ["site"]
    assert not list(site.glob(".misf-*"))


@pytest.mark.slow
def test_a_checkpoint_becomes_float16(tmp_path: Path, package: Path, tiny_checkpoint: Path) -> None:
    result = export("--checkpoint", tiny_checkpoint, "--web", tmp_path / "site", "--onnxruntime-web", package)
    assert result.exit_code == 0, result.output
    network = json.loads((tmp_path / "site/page.json").read_text())["network"]
    assert (network["precision"], network["working_size"]) == ("fp16", 256)


def test_what_is_in_a_folder_stays(tmp_path: Path, package: Path) -> None:
    site = tmp_path / "site"
    site.mkdir()
    (site / "CNAME").write_text("example.org")
    arguments = ("--onnx", "misf-small", "--web", site, "--onnxruntime-web", package)
    result = export(*arguments)
    assert result.exit_code == 1
    assert "is not empty" in result.output
    assert [path.name for path in site.iterdir()] == ["CNAME"]
    assert export(*arguments, "--force").exit_code == 0
    assert (site / "CNAME").read_text() == "example.org"
    assert (site / "index.html").is_file()


def test_nothing_is_written_when_something_is_wrong(tmp_path: Path, package: Path) -> None:
    site, other = tmp_path / "site", foreign(tmp_path / "other.onnx")
    result = export("--onnx", other, "--web", site, "--onnxruntime-web", package)
    assert result.exit_code == 1
    assert "is not one of our ONNX files" in result.output
    (package / WASM).unlink()
    result = export("--onnx", "misf-small", "--web", site, "--onnxruntime-web", package)
    assert result.exit_code == 1
    assert "is not the unpacked npm package onnxruntime-web" in result.output
    assert not site.exists()


@pytest.mark.parametrize(
    ("npm", "code", "said"),
    [
        (None, 4, "needs npm"),
        ("echo 'npm error code ENOTFOUND' >&2; exit 1", 4, "npm error code ENOTFOUND): are you online"),
        ("""echo '[{"integrity": "sha512-other", "filename": "x.tgz"}]'""", 1, "is not the one"),
    ],
    ids=["missing", "offline", "another package"],
)
def test_npm_fails_with_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, npm: str | None, code: int, said: str
) -> None:
    (tmp_path / "bin").mkdir()
    if npm:
        program = tmp_path / "bin/npm"
        program.write_text(f"#!/bin/sh\n{npm}\n")
        program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    result = export("--onnx", "misf-small", "--web", tmp_path / "site")
    assert result.exit_code == code, result.output
    assert said in result.output
    assert not (tmp_path / "site").exists()


@pytest.mark.parametrize(
    "arguments",
    [
        (),
        ("--onnx", "misf-small"),
        ("--onnx", "misf-small", "--checkpoint", "misf-small", "--web", "site"),
        ("--onnx", "misf-small", "--web", "site", "--fp16"),
        ("--onnx", "misf-small", "--web", "site", "-o", "x.onnx"),
        ("--checkpoint", "misf-small", "--web", "site", "--max-shape", "4x512x512"),
    ],
)
def test_options_that_do_not_fit_are_usage_errors(arguments: tuple[str, ...]) -> None:
    result = export(*arguments)
    assert result.exit_code == 2, result.output
    assert not Path("site").exists()
