"""Every command and every line of Python in the documents runs as it is printed, or is marked as needing more.

A block's mark follows its language: ```sh gpu. What is run is what is printed, but for `--steps N`, which becomes 2.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

ROOT = Path(__file__).parent.parent
DOCUMENTS = sorted(
    path.relative_to(ROOT).as_posix()
    for path in (*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("training/weights/*.md"))
)
MARKS = {
    "network": "installs or downloads something",
    "gpu": "needs an NVIDIA GPU",
    "board": "needs a Jetson board",
    "data": "needs a published data set",
    "long": "takes minutes; tested by itself",
    "server": "needs a server that is running",
}
FENCE = re.compile(r"^```(.*?)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks(document: str) -> list[tuple[str, str, str]]:
    """Return each fenced block's language, mark and content."""
    found = FENCE.findall((ROOT / document).read_text(encoding="utf-8"))
    return [(*(info.split() + ["", ""])[:2], content) for info, content in found]


def test_every_block_has_a_language_and_a_mark_that_we_know() -> None:
    assert len(DOCUMENTS) > 8
    for document in DOCUMENTS:
        text = FENCE.sub("", (ROOT / document).read_text(encoding="utf-8"))
        assert "```" not in text, document
        assert not re.search(r"(?m)^\n {4}\S", text), f"{document}: an indented block is not run: fence it"
        for language, mark, content in blocks(document):
            assert language in ("sh", "python", "text", "yaml", "ini"), (document, content)
            assert mark in ("", *MARKS), (document, content)


@pytest.fixture
def folder(tmp_path: Path, tiny_checkpoint: Path) -> Path:
    """What the documents' commands find where they are run: a clone with pictures and a checkpoint of the user's."""
    from misf.training.model.checkpoint import load_checkpoint, save_checkpoint

    for name in ("runtime", "benchmarks", "training"):
        (tmp_path / name).symlink_to(ROOT / name)
    samples = sorted((ROOT / "runtime/samples").glob("*.jpg"))
    mask = ROOT / "runtime/samples/masks/astronaut.png"
    for name in ("photographs", "drawings", "held-out", "masks"):
        (tmp_path / name).mkdir()
    for sample in samples[:3]:
        for name in ("photographs", "drawings", "held-out"):
            shutil.copy(sample, tmp_path / name)
        with Image.open(sample) as picture, Image.open(mask) as hole:
            hole.resize(picture.size).save(tmp_path / "masks" / f"{sample.stem}.png")
    shutil.copy(ROOT / "runtime/samples/astronaut.jpg", tmp_path / "photo.jpg")
    shutil.copy(mask, tmp_path / "mask.png")
    tiny = load_checkpoint(tiny_checkpoint)
    for name in ("best.pt", "best.safetensors"):
        save_checkpoint(tmp_path / name, tiny.config, tiny.weights)
    return tmp_path


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("document", DOCUMENTS)
def test_what_a_document_prints_runs(document: str, folder: Path) -> None:
    ours = [(language, content) for language, mark, content in blocks(document) if not mark]
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    for language, content in ours:
        if language not in ("sh", "python"):
            continue
        command = ["bash", "-euo", "pipefail", "-c"] if language == "sh" else [sys.executable, "-c"]
        done = subprocess.run(
            [*command, re.sub(r"--steps \d+", "--steps 2", content)],
            cwd=folder,
            env=environment,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, f"{document}:\n{content}\n{done.stderr}"
