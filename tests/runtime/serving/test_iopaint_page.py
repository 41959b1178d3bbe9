"""IOPaint's own page, from its wheel, drives our server in a browser: a stroke, a fill, a picture to download."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.support.serving import encoded, opened, serving
from tests.support.tiny_models import mean_fill

pytestmark = [pytest.mark.slow, pytest.mark.timeout(240)]
SIZE = (256, 384)


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """IOPaint's page, unpacked; its Python is not installed."""
    folder = tmp_path_factory.mktemp("iopaint")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "iopaint==1.6.0", "-d", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    wheels = list(folder.glob("*.whl"))
    if done.returncode or not wheels:
        pytest.skip(f"IOPaint's wheel cannot be had: {done.stderr.strip().splitlines()[-1:]}")
    with zipfile.ZipFile(wheels[0]) as wheel:
        wheel.extractall(folder)
    return folder / "iopaint" / "web_app"


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    chromium = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("chromium-browser")
    if not chromium:
        pytest.skip("there is no Chromium: apt-get install chromium, or name one in CHROMIUM")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        yield browser
        browser.close()


def test_a_stroke_on_iopaint_s_page_is_filled(page: Path, browser: Any, tmp_path: Path) -> None:
    from PIL import Image

    rng = np.random.default_rng(3)
    pixels = rng.integers(0, 256, (*SIZE, 3), np.uint8)
    photo = tmp_path / "photo.png"
    photo.write_bytes(encoded(Image.fromarray(pixels), "PNG"))
    answers: list[tuple[int, dict[str, str], bytes, dict[str, Any]]] = []

    def keep(route: Any) -> None:
        answer = route.fetch()
        answers.append((answer.status, answer.headers, answer.body(), json.loads(route.request.post_data)))
        route.fulfill(response=answer)

    with serving(mean_fill(tmp_path / "mean.onnx"), page=str(page)) as client:
        tab = browser.new_page(viewport={"width": 1200, "height": 800})
        errors: list[str] = []
        tab.on("pageerror", lambda error: errors.append(str(error)))
        tab.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
        tab.route("**/api/v1/inpaint", keep)
        tab.goto(str(client.base_url))
        tab.set_input_files("input[type=file]", str(photo))
        canvas = tab.locator("canvas").first
        canvas.wait_for(timeout=30_000)
        tab.wait_for_timeout(1000)
        box = canvas.bounding_box()
        assert box is not None
        across, down = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
        tab.mouse.move(across - 40, down)
        tab.mouse.down()
        for step in range(1, 9):
            tab.mouse.move(across - 40 + 10 * step, down)
        with tab.expect_response("**/api/v1/inpaint", timeout=60_000):
            tab.mouse.up()
        tab.wait_for_timeout(500)
        tab.close()
    [(status, headers, body, payload)] = answers
    assert status == 200
    assert headers["content-type"] == "image/png"
    assert headers["x-seed"].isdigit()
    painted = np.asarray(opened_uri(payload["mask"]).convert("RGB").convert("L")) > 127
    changed = (np.asarray(opened(body).convert("RGB")) != pixels).any(axis=2)
    assert painted.shape == SIZE
    assert painted.sum() > 1000
    assert not changed[~painted].any()
    assert changed[painted].mean() > 0.99
    # Its progress bar asks for socket.io, which we do not have, and does without.
    assert not [text for text in errors if "404" not in text], errors


def opened_uri(uri: str) -> Any:
    import base64

    return opened(base64.b64decode(uri.partition(",")[2]))
