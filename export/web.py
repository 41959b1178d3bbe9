"""A folder that fills pictures in the browser: the page, the network, and ONNX Runtime's WebAssembly from npm."""

from __future__ import annotations

import gzip
import json
import logging
import shutil
import subprocess
import tarfile
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..plugins.shared.command import one_line
from ..plugins.shared.errors import EnvironmentMismatch, MisfError

log = logging.getLogger(__name__)

PACKAGE = "onnxruntime-web"
VERSION = "1.30.0"
INTEGRITY = "sha512-q0y+JrrtukXSzsBWEMccVfqX25LRmosXHF+CaRJmg8pZClzcV7svNc4rKY3jL02Vb7QmRMDs1SigqR4CXAfKYQ=="
"""Of the tar archive of that version, as npm states it."""
SCRIPT, WASM = "dist/ort.wasm.bundle.min.mjs", "dist/ort-wasm-simd-threaded.wasm"
NPM_SECONDS = 300
ELSEWHERE = f"or give --onnxruntime-web with the unpacked npm package {PACKAGE} {VERSION}"

_RUNTIME = Path(__file__).parents[1] / "runtime"


@dataclass(frozen=True)
class WebReport:
    """The written folder and what a visit downloads."""

    folder: Path
    network: dict[str, Any]
    """The description of the network in page.json."""
    bytes: int
    visit_bytes: int
    """Bytes that a visitor downloads once, including the samples: everything but the licences."""


def check_folder(folder: Path, force: bool) -> None:
    """Raise MisfError if a folder is not empty, unless `force`; OSError if it is not a folder."""
    if folder.exists() and not folder.is_dir():
        raise OSError(f"cannot write {folder}: it is not a folder")
    if folder.is_dir() and any(folder.iterdir()) and not force:
        raise MisfError(
            f"{folder} is not empty: name a new folder, or give --force to replace the page's files in it (others stay)"
        )


def write_web(
    folder: Path, make_network: Callable[[Path], Path], package: Path | None = None, force: bool = False
) -> WebReport:
    """Write the page with its network, ready for any static file server, and return a report.

    Args:
        folder: the target folder, created if it does not exist. Nothing is put there until everything is ready.
        make_network: returns the path of the .onnx file; it may write the file into the folder that it is given.
        package: the unpacked npm package onnxruntime-web; fetched with npm by default.
        force: also write into a folder that is not empty; files with other names stay.

    Raises:
        EnvironmentMismatch: npm or ONNX Runtime is not installed, or npm cannot fetch the package.
        MisfError: the folder is not empty, or npm fails.
        ValueError: `package` is not that package, or the network is not one of ours.

    """
    check_folder(folder, force)
    with tempfile.TemporaryDirectory(prefix="misf-web-") as temporary:
        scratch = Path(temporary)
        package = package or _fetch_package(scratch)
        runtime = _runtime_files(package)
        onnx_file = make_network(scratch)
        site = scratch / "site"
        shutil.copytree(_RUNTIME / "serving/page", site)
        shutil.copytree(_RUNTIME / "samples", site / "samples", ignore=shutil.ignore_patterns("masks"))
        (site / "ort").mkdir()
        for name, source in runtime.items():
            shutil.copyfile(source, site / "ort" / name)
        # Few hosts compress this type of file, so it is compressed here: 3.7 MB instead of 14.
        (site / "ort/ort.wasm.gz").write_bytes(gzip.compress((package / WASM).read_bytes(), mtime=0))
        shutil.copyfile(onnx_file, site / "network.onnx")
        network = _description(onnx_file, site, json.loads((package / "package.json").read_text())["version"])
        (site / "page.json").write_text(json.dumps({"server": False, "network": network}, indent=2) + "\n")
        files = [path for path in site.rglob("*") if path.is_file()]
        licences = sum(path.stat().st_size for path in files if path.suffix in ("", ".md", ".txt"))
        total = sum(path.stat().st_size for path in files)
        report = WebReport(folder, network, total, total - licences)
        _put(site, folder)
    return report


def _put(site: Path, folder: Path) -> None:
    """Move a finished site into its folder; page.json, which names the other files, comes last."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".misf-", dir=folder) as near:
            ready = Path(shutil.copytree(site, Path(near) / "site"))
            paths = [path.relative_to(ready) for path in ready.rglob("*") if path.is_file()]
            for path in sorted(paths, key=lambda path: path.name == "page.json"):
                (folder / path).parent.mkdir(parents=True, exist_ok=True)
                (ready / path).replace(folder / path)
    except shutil.Error as error:
        raise OSError(f"cannot write {folder}: {one_line(error)}") from error
    except OSError as error:
        raise OSError(f"cannot write {folder}: {error.strerror or error}") from error


def _description(onnx_file: Path, site: Path, version: str) -> dict[str, Any]:
    """Return the facts about a network that the page needs; ValueError if the file is not one of ours."""
    from ..runtime.backends.onnx_runtime import OnnxRuntimeBackend
    from ..runtime.pictures.settings import network_working_size
    from ..training.model.config import NetworkConfig

    backend = OnnxRuntimeBackend(onnx_file, device="cpu")
    return {
        "file": "network.onnx",
        "precision": backend.file_precision,
        "working_size": network_working_size(backend.config),
        "multiple": NetworkConfig.from_json(json.dumps(backend.config)).multiple,
        "checkpoint_sha256": backend.checkpoint_sha256,
        "runtime": {"version": version, "script": "ort/ort.js", "wasm": "ort/ort.wasm.gz"},
        "bytes": {
            "network": onnx_file.stat().st_size,
            "runtime": (site / "ort/ort.wasm.gz").stat().st_size,
        },
    }


def _runtime_files(package: Path) -> dict[str, Path]:
    """Return the files of ONNX Runtime that a browser needs, with their licences: name on the page -> path."""
    try:
        description = json.loads((package / "package.json").read_text(encoding="utf-8"))
        name = description["name"] if "version" in description else None
    except (OSError, ValueError, KeyError, TypeError):
        name = None
    missing = [file for file in (SCRIPT, WASM) if not (package / file).is_file()]
    if name != PACKAGE or missing:
        raise ValueError(
            f"{package} is not the unpacked npm package {PACKAGE} {VERSION}: expected package.json, {SCRIPT} and {WASM}"
        )
    import onnxruntime

    # The npm package contains no licence; the Python package of the same project has it, and the third-party notices.
    python = Path(onnxruntime.__file__).parent
    licences = {
        file: (package if (package / file).is_file() else python) / file
        for file in ("LICENSE", "ThirdPartyNotices.txt")
    }
    # Many file servers serve .mjs with a type that browsers refuse to run.
    return {"ort.js": package / SCRIPT, **licences}


def _fetch_package(scratch: Path) -> Path:
    """Return the pinned npm package, unpacked; EnvironmentMismatch if npm is missing or cannot reach its registry."""
    npm = shutil.which("npm")
    if npm is None:
        raise EnvironmentMismatch(f"misf-export --web needs npm, which was not found: install Node.js, {ELSEWHERE}")
    log.info("fetching %s %s with npm (33 MB)", PACKAGE, VERSION)
    command = [npm, "pack", "--json", "--fetch-retries=1", f"{PACKAGE}@{VERSION}"]
    try:
        done = subprocess.run(command, cwd=scratch, capture_output=True, text=True, timeout=NPM_SECONDS, check=False)
    except subprocess.TimeoutExpired:
        raise EnvironmentMismatch(
            f"npm did not answer within {NPM_SECONDS} s: are you online? Try again, {ELSEWHERE}"
        ) from None
    if done.returncode:
        said = next((line for line in done.stderr.splitlines() if line.startswith("npm error")), "no reason given")
        raise EnvironmentMismatch(
            f"npm cannot fetch {PACKAGE} {VERSION} ({said}): are you online? Try again, {ELSEWHERE}"
        )
    [packed] = json.loads(done.stdout)
    if packed["integrity"] != INTEGRITY:
        raise MisfError(f"npm's {PACKAGE} {VERSION} is not the one this misf was tested with: {packed['integrity']}")
    with tarfile.open(scratch / packed["filename"]) as archive:
        archive.extractall(scratch, filter="data")
    return scratch / "package"
