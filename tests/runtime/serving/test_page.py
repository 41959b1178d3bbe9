"""The page in a real browser, headless Chromium: with a server, and with the network in the browser itself."""

from __future__ import annotations

import base64
import contextlib
import io
import json
import os
import shutil
import subprocess
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image
from scipy.ndimage import distance_transform_edt

from misf.plugins.shared.errors import EnvironmentMismatch
from misf.plugins.shared.shipped import shipped_model
from misf.runtime import Inpainter
from misf.runtime.pictures.canvas import PillowCanvas, Pixels
from misf.runtime.pictures.geometry import Box, Mask

from ...support.page_server import Site, served
from ...support.serving import serving

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: the page is not tested")

pytestmark = [pytest.mark.slow, pytest.mark.timeout(240)]

ROOT = Path(__file__).parents[3]
PAGE = ROOT / "runtime/serving/page"
SAMPLES = ROOT / "runtime/samples"
AXE = "axe-core@4.14.1"
DESKTOP: dict[str, Any] = {"viewport": {"width": 1280, "height": 800}}
PHONE: dict[str, Any] = {
    "viewport": {"width": 390, "height": 844},
    "device_scale_factor": 2,
    "has_touch": True,
    "is_mobile": True,
}
Open = Callable[..., Any]


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    program = next((found for name in ("chromium", "google-chrome") if (found := shutil.which(name))), None)
    if program is None:
        pytest.skip("no chromium here: the page is not tested")
    with playwright.sync_playwright() as runner:
        browser = runner.chromium.launch(executable_path=program, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def opened(chromium: Any) -> Iterator[Open]:
    """Open a page in a fresh profile; at the end no error may stand in its console, `expected` ones aside."""
    contexts, faults = [], []

    def open_page(url: str, expected: str = "", **settings: Any) -> Any:
        context = chromium.new_context(**{**DESKTOP, **settings})
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(30000)
        page.on("pageerror", lambda error: faults.append(str(error)))
        page.on(
            "console",
            lambda message: (
                faults.append(message.text)
                if message.type in ("error", "warning") and not (expected and expected in message.text)
                else None
            ),
        )
        page.goto(url)
        page.wait_for_selector("#samples img")
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert not faults, faults


@pytest.fixture(scope="module")
def inpainter() -> Inpainter:
    return Inpainter("misf-small", backend="onnxruntime")


@pytest.fixture
def site(inpainter: Inpainter) -> Iterator[Site]:
    with served(PAGE, inpainter) as found:
        yield found


@pytest.fixture(scope="module")
def web_folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """What misf-export --web writes, for float16 and for float32."""
    from misf.export import exporter
    from misf.export.web import _fetch_package, write_web
    from misf.training.model.checkpoint import load_checkpoint

    scratch = tmp_path_factory.mktemp("web")
    try:
        package = _fetch_package(scratch)
    except EnvironmentMismatch as error:
        pytest.skip(f"the network in the browser is not tested: {error}")
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(exporter, "check", lambda *_: [])  # tested elsewhere, and long
        exporter.export_onnx(load_checkpoint("misf-small"), scratch / "fp32.onnx")
    files = {"fp16": shipped_model("misf-small"), "fp32": scratch / "fp32.onnx"}
    for name, file in files.items():
        write_web(scratch / name, lambda _, file=file: file, package)
    return {name: scratch / name for name in files}


def photograph(size: tuple[int, int], **save: Any) -> bytes:
    """Return a file of a part of a sample, or of it enlarged, of H,W; a PNG unless told otherwise."""
    with Image.open(SAMPLES / "coffee.jpg") as sample:
        enlarged = sample.convert("RGB").resize((max(600, size[1]), max(600, size[0])))
    buffer = io.BytesIO()
    enlarged.crop((0, 0, size[1], size[0])).save(buffer, **{"format": "PNG", **save})
    return buffer.getvalue()


def give(page: Any, name: str, data: bytes) -> None:
    page.set_input_files("#file", {"name": name, "mimeType": "application/octet-stream", "buffer": data})
    page.wait_for_selector(f"#about:has-text('{name}')")


def on_screen(page: Any, size: tuple[int, int], *points: tuple[float, float]) -> list[tuple[float, float]]:
    """Return where points of a picture of H,W, as shares of its sides, are while it fits the window."""
    box = page.locator("#canvas").bounding_box()
    edge = 12 if box["width"] < 500 else 24
    across, down = box["width"] - 2 * edge, box["height"] - edge - 56
    scale = min(across / size[1], down / size[0], 8)
    left, top = box["x"] + edge + (across - size[1] * scale) / 2, box["y"] + edge + (down - size[0] * scale) / 2
    return [(left + x * size[1] * scale, top + y * size[0] * scale) for x, y in points]


def stroke(page: Any, size: tuple[int, int], *points: tuple[float, float]) -> None:
    first, *others = on_screen(page, size, *points)
    page.mouse.move(*first)
    page.mouse.down()
    for point in others:
        page.mouse.move(*point, steps=5)
    page.mouse.up()


def filled(page: Any) -> None:
    """Press Fill and wait until it is done."""
    page.evaluate("document.getElementById('status').textContent = ''")
    page.click("#fill")
    page.wait_for_selector("#status:has-text('Filled'), #error:visible", timeout=90000)
    assert not page.locator("#error").is_visible(), page.inner_text("#error")


def downloaded(page: Any) -> tuple[str, bytes]:
    with page.expect_download() as coming:
        page.click("#download")
    return coming.value.suggested_filename, Path(coming.value.path()).read_bytes()


def isolated(page: Any) -> None:
    """Wait until the service worker has come and the page has loaded again, with threads for WebAssembly."""
    for _ in range(100):
        with contextlib.suppress(playwright.Error):  # in between two pages
            if page.evaluate("crossOriginIsolated"):
                break
        page.wait_for_timeout(100)
    else:
        pytest.fail("the page has no threads")
    page.wait_for_selector("#samples img")


def pixels(data: bytes) -> NDArray[np.uint8]:
    with Image.open(io.BytesIO(data)) as image:
        return np.asarray(image.convert("RGB"))


def hole(data: bytes) -> NDArray[np.bool_]:
    with Image.open(io.BytesIO(data)) as image:
        assert image.mode == "1"
        return np.asarray(image)


def test_a_picture_is_filled_again_and_again_and_downloaded(site: Site, opened: Open) -> None:
    size, data = (300, 420), photograph((300, 420))
    page = opened(site.url)
    give(page, "cup.png", data)
    stroke(page, size, (0.3, 0.3), (0.5, 0.35))
    filled(page)
    first = site.requests[0]
    assert first["image"] == data
    assert first["query"] == {"strategy": "auto", "grow": "0", "feather": "0"}
    painted = hole(first["mask"])
    thickness = int(page.inner_text("#size-value").split()[0])
    length = np.hypot(0.2 * size[1], 0.05 * size[0])
    assert painted.shape == size
    assert painted[105, 168]
    assert painted.sum() == pytest.approx(thickness * length + np.pi * thickness**2 / 4, rel=0.03)

    page.keyboard.press("Control+z")
    page.wait_for_selector("#fill:enabled")  # the stroke is back
    page.keyboard.press("Control+z")
    page.wait_for_selector("#fill:disabled")
    for _ in range(2):
        page.keyboard.press("Control+Shift+z")
        page.wait_for_timeout(100)
    page.wait_for_selector("#compare:enabled")

    page.mouse.move(*on_screen(page, size, (0.5, 0.5))[0])
    page.mouse.wheel(0, -400)
    page.wait_for_timeout(100)
    level = int(page.inner_text("#zoom-level").split()[0])
    page.keyboard.press("0")
    page.wait_for_timeout(100)
    assert level > 1.5 * int(page.inner_text("#zoom-level").split()[0])

    page.keyboard.press("r")
    stroke(page, size, (0.7, 0.6), (0.8, 0.9))
    page.keyboard.press("l")
    stroke(page, size, (0.05, 0.6), (0.2, 0.6), (0.2, 0.8), (0.05, 0.8))
    page.keyboard.press("e")
    stroke(page, size, (0.75, 0.5), (0.75, 1.0))
    page.select_option("#strategy", "crop")
    page.fill("#grow", "3")
    filled(page)
    second = hole(site.requests[1]["mask"])
    assert site.requests[1]["query"] == {"strategy": "crop", "grow": "3", "feather": "0"}
    assert second[210, 50]  # lasso
    assert second[225, int(0.71 * size[1])]  # rectangle
    assert not second[225, int(0.75 * size[1])]  # erased
    assert second[:, : int(0.3 * size[1])].sum() == pytest.approx(0.15 * size[1] * 0.2 * size[0], rel=0.05)

    name, result = downloaded(page)
    assert name == "cup_filled.png"
    changed = (pixels(result) != pixels(data)).any(axis=-1)
    assert not changed[~(painted | second)].any()
    assert changed[painted | second].mean() > 0.9


def test_the_file_goes_as_it_came_and_the_mask_is_for_the_picture_as_seen(site: Site, opened: Open) -> None:
    """A JPEG that EXIF turns by a quarter: what the server gets are its bytes, and what comes back keeps EXIF."""
    exif = Image.Exif()
    exif[0x0112], exif[0x010F] = 6, "camera"
    data = photograph((200, 320), format="JPEG", quality=90, exif=exif)
    page = opened(site.url)
    give(page, "turned.jpg", data)
    assert "200 \u00d7 320 JPEG" in page.inner_text("#about")
    stroke(page, (320, 200), (0.5, 0.2), (0.6, 0.3))
    filled(page)
    assert site.requests[0]["image"] == data
    assert hole(site.requests[0]["mask"]).shape == (320, 200)
    assert hole(site.requests[0]["mask"])[64, 100]
    name, result = downloaded(page)
    assert name == "turned_filled.jpg"
    with Image.open(io.BytesIO(result)) as image:
        assert image.format == "JPEG"
        assert image.getexif()[0x010F] == "camera"


def test_keys_alone_do_everything(site: Site, opened: Open) -> None:
    page = opened(site.url)
    page.locator("#samples button").nth(3).focus()
    page.keyboard.press("Enter")
    page.wait_for_selector("#about:has-text('rocket')")
    assert page.evaluate("document.activeElement.id") == "canvas"
    page.keyboard.press("]")
    page.keyboard.press("Enter")
    for _ in range(6):
        page.keyboard.press("ArrowRight")
    page.keyboard.press("Enter")
    page.wait_for_selector("#fill:enabled")
    page.keyboard.press("f")
    page.wait_for_selector("#status:has-text('Filled')")
    painted = hole(site.requests[0]["mask"])
    rows, columns = np.nonzero(painted)
    assert np.ptp(columns) > np.ptp(rows) > 10  # a stroke to the right, from the middle
    assert painted[painted.shape[0] // 2, painted.shape[1] // 2]
    page.keyboard.press("c")
    page.wait_for_selector("#divider:visible")
    before = page.screenshot()
    page.keyboard.press("End")
    page.wait_for_timeout(200)
    assert page.screenshot() != before
    page.keyboard.press("Escape")
    page.wait_for_selector("#divider", state="hidden")
    with page.expect_download() as coming:
        page.keyboard.press("Control+s")
    assert coming.value.suggested_filename == "rocket_filled.jpg"


def test_fingers_paint_and_pinch_on_a_phone(site: Site, opened: Open) -> None:
    size = (300, 300)
    page = opened(site.url, **PHONE)
    give(page, "cup.png", photograph(size))
    devtools = page.context.new_cdp_session(page)

    def touch(kind: str, *points: tuple[float, float]) -> None:
        places = [{"x": x, "y": y, "id": number} for number, (x, y) in enumerate(points)]
        devtools.send("Input.dispatchTouchEvent", {"type": kind, "touchPoints": places})

    start, stop, other = on_screen(page, size, (0.3, 0.4), (0.6, 0.4), (0.5, 0.5))
    touch("touchStart", start)
    for share in (0.25, 0.5, 0.75, 1):
        touch("touchMove", (start[0] + share * (stop[0] - start[0]), start[1]))
    touch("touchEnd")
    page.wait_for_selector("#fill:enabled")
    level = page.inner_text("#zoom-level")
    touch("touchStart", start)
    touch("touchStart", start, other)
    for away in (10, 30, 60):
        touch("touchMove", (start[0] - away, start[1] - away), (other[0] + away, other[1] + away))
    touch("touchEnd")
    page.wait_for_timeout(200)
    assert int(page.inner_text("#zoom-level").split()[0]) > 1.5 * int(level.split()[0])
    page.tap("#fill")
    page.wait_for_selector("#status:has-text('Filled')")
    painted = hole(site.requests[0]["mask"])
    assert painted[120, 100:170].all()
    assert not painted[200:].any()  # two fingers paint nothing
    width = page.evaluate("document.documentElement.scrollWidth")
    assert width == PHONE["viewport"]["width"]


def test_errors_say_what_to_do(site: Site, opened: Open) -> None:
    page = opened(site.url, expected="the server responded with a status of")
    page.set_input_files("#file", {"name": "notes.png", "mimeType": "image/png", "buffer": b"no picture at all"})
    page.wait_for_selector("#error:has-text('Choose a JPEG, PNG, WebP or AVIF file')")
    page.set_input_files("#file", {"name": "cut.png", "mimeType": "image/png", "buffer": photograph((99, 99))[:900]})
    page.wait_for_selector("#error:has-text('cut.png is damaged')")
    give(page, "cup.png", photograph((99, 99)))
    stroke(page, (99, 99), (0.4, 0.4), (0.5, 0.4))

    site.answers = [(400, {}, {"error": "ValueError", "detail": "the mask is too thin"})]
    page.click("#fill")
    page.wait_for_selector("#error:has-text('the mask is too thin')")
    site.answers = [(413, {}, {"error": "TooLarge", "detail": "at most 1 MB"})]
    page.click("#fill")
    page.wait_for_selector("#error:has-text('larger than this server accepts')")
    assert "at most 1 MB" in page.inner_text("#error")
    site.answers = [(504, {}, {"error": "RequestError", "detail": "not finished within 60 s"})]
    page.click("#fill")
    page.wait_for_selector("#error:has-text('longer than this server allows')")
    assert len(site.requests) == 3  # it would take as long again
    site.answers = [(503, {"Retry-After": "1"}, {"error": "busy"})]
    filled(page)
    assert len(site.requests) == 5

    page.keyboard.press("Control+z")
    page.wait_for_selector("#fill:enabled")
    site.answers = [(401, {}, {"error": "no token"})]
    page.click("#fill")
    page.wait_for_selector("#token:visible")
    page.evaluate("""() => {
      const clipboardData = new DataTransfer();
      clipboardData.setData("text/plain", "open sesame");
      document.getElementById("secret").dispatchEvent(new ClipboardEvent("paste", { clipboardData, bubbles: true }));
    }""")
    assert not page.locator("#error").is_visible()  # pasted text is no picture, but it is for the dialog
    page.fill("#secret", "open sesame")
    page.keyboard.press("Enter")
    page.wait_for_selector("#compare:enabled")
    assert site.requests[-1]["headers"]["Authorization"] == "Bearer open sesame"


def test_a_server_that_is_gone_is_an_error_and_nothing_is_lost(inpainter: Inpainter, opened: Open) -> None:
    with served(PAGE, inpainter) as site:
        page = opened(site.url, expected="ERR_CONNECTION_REFUSED")
        give(page, "cup.png", photograph((99, 99)))
        stroke(page, (99, 99), (0.4, 0.4), (0.5, 0.4))
    page.click("#fill")
    page.wait_for_selector("#error:has-text('The server does not answer')")
    page.wait_for_selector("#fill:enabled")


def test_keys_without_ctrl_can_be_turned_off(site: Site, opened: Open) -> None:
    page = opened(site.url)
    page.keyboard.press("?")
    page.uncheck("#single-keys")
    page.keyboard.press("Escape")
    page.reload()  # it is kept
    page.wait_for_selector("#samples img")
    give(page, "cup.png", photograph((99, 99)))
    stroke(page, (99, 99), (0.4, 0.4), (0.5, 0.4))
    for key in ("e", "f", "?"):
        page.keyboard.press(key)
    assert page.is_checked("input[value=brush]")
    assert not page.locator("#keys").is_visible()
    page.keyboard.press("Control+z")
    page.wait_for_selector("#fill:disabled")
    assert not site.requests


def test_a_browser_that_keeps_nothing_fills(site: Site, opened: Open) -> None:
    page = opened(site.url)
    page.add_init_script("""for (const name of ["localStorage", "sessionStorage"])
      Object.defineProperty(window, name, { get() { throw new DOMException("refused", "SecurityError"); } });""")
    page.reload()
    page.wait_for_selector("#samples img")
    give(page, "cup.png", photograph((99, 99)))
    stroke(page, (99, 99), (0.4, 0.4), (0.5, 0.4))
    page.click("#theme")
    filled(page)


def test_a_fill_can_be_cancelled_and_started_again(site: Site, opened: Open) -> None:
    page = opened(site.url)
    give(page, "cup.png", photograph((99, 99)))
    stroke(page, (99, 99), (0.4, 0.4), (0.5, 0.4))
    page.route("**/inpaint?*", lambda _route: None)  # no answer comes
    page.click("#fill")
    page.wait_for_selector("#fill:has-text('Cancel')")
    page.keyboard.press("Escape")
    page.wait_for_selector("#status:has-text('Cancelled')")
    page.unroute("**/inpaint?*")
    filled(page)


@pytest.fixture(scope="module")
def axe(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The text of axe-core, which looks for what keeps people with impairments out."""
    folder = tmp_path_factory.mktemp("axe")
    npm = shutil.which("npm")
    done = npm and subprocess.run([npm, "pack", "--json", AXE], cwd=folder, capture_output=True, text=True, timeout=120)
    if not done or done.returncode:
        pytest.skip(f"npm cannot fetch {AXE}: accessibility is not tested")
    with tarfile.open(folder / json.loads(done.stdout)[0]["filename"]) as archive:
        file = archive.extractfile("package/axe.min.js")
        assert file is not None
        return file.read().decode()


@pytest.mark.parametrize("settings", [{}, {"color_scheme": "dark"}, PHONE], ids=["light", "dark", "phone"])
def test_axe_finds_no_serious_fault(site: Site, opened: Open, axe: str, settings: dict[str, Any]) -> None:
    page = opened(site.url, **settings)

    def faults() -> list[str]:
        page.wait_for_timeout(300)
        found = page.evaluate(axe + "; axe.run().then(({ violations }) => violations)")
        return [
            f"{fault['id']}: {node['html']}"
            for fault in found
            if fault["impact"] in ("serious", "critical")
            for node in fault["nodes"]
        ]

    assert faults() == []
    give(page, "cup.png", photograph((200, 300)))
    stroke(page, (200, 300), (0.4, 0.4), (0.5, 0.4))
    page.evaluate("document.getElementById('more').open = true")
    assert faults() == []
    filled(page)
    page.click("#compare")
    assert faults() == []
    page.set_input_files("#file", {"name": "notes.png", "mimeType": "image/png", "buffer": b"no picture"})
    page.wait_for_selector("#error:visible")
    assert faults() == []
    page.keyboard.press("?")
    page.wait_for_selector("#keys:visible")
    assert faults() == []


def test_a_static_folder_fills_in_the_browser(web_folders: dict[str, Path], opened: Open) -> None:
    """From a plain file server: with threads by the service worker, and pixels outside the holes equal."""
    size, data = (400, 640), photograph((400, 640))
    with served(web_folders["fp16"]) as site:
        page = opened(site.url)
        isolated(page)
        assert "stays on this device" in page.inner_text("#note")
        give(page, "cup.png", data)
        stroke(page, size, (0.2, 0.3), (0.35, 0.4))
        page.click("#fill")
        page.click("#fill:has-text('Cancel')")
        page.wait_for_selector("#status:has-text('Cancelled')")
        filled(page)
        stroke(page, size, (0.7, 0.3), (0.7, 0.6))
        page.fill("#grow", "5")
        filled(page)
        name, result = downloaded(page)
        assert site.requests == []
    assert name == "cup_filled.png"
    changed = (pixels(result) != pixels(data)).any(axis=-1)
    assert 0.02 < changed.mean() < 0.12
    assert changed[140, 176]
    assert changed[180, 448]
    y, x = np.mgrid[: size[0], : size[1]]
    near = (np.abs(x - 448) < 30) | ((x < 270) & (y < 220))
    assert not changed[~near].any()


def test_misf_serve_fills_there_or_here(web_folders: dict[str, Path], opened: Open) -> None:
    """The real server, with the page that comes with misf and with a folder of misf-export --web."""
    data = photograph((300, 420))
    with serving(shipped_model("misf-small")) as client:
        page = opened(str(client.base_url))
        page.locator("#samples button").first.click()
        page.wait_for_selector("#about:has-text('astronaut')")
        assert not page.locator("#where").is_visible()
    with serving(shipped_model("misf-small"), page=str(web_folders["fp16"])) as client:
        page = opened(str(client.base_url))
        assert page.evaluate("crossOriginIsolated")
        give(page, "cup.png", data)
        page.fill("#feather", "6")
        stroke(page, (300, 420), (0.3, 0.3), (0.5, 0.35))
        filled(page)
        _, there = downloaded(page)
        page.keyboard.press("Control+z")
        page.wait_for_selector("#fill:enabled")
        page.check("[name=where][value=browser]")
        filled(page)
        _, here = downloaded(page)
    changed = (pixels(there) != pixels(data)).any(axis=-1)
    assert 0.02 < changed.mean() < 0.2
    difference = pixels(here).astype(int) - pixels(there)
    assert np.abs(difference).max() <= 1
    assert (difference != 0).mean() < 0.01


def test_the_page_works_again_without_a_network(web_folders: dict[str, Path], opened: Open) -> None:
    with served(web_folders["fp16"]) as site:
        page = opened(site.url, expected="ERR_CONNECTION_REFUSED")
        isolated(page)
        give(page, "cup.png", photograph((99, 99)))
        stroke(page, (99, 99), (0.4, 0.4), (0.5, 0.4))
        filled(page)
        downloaded(page)  # or the page would ask before it is left
    page.reload()
    page.locator("#samples button").first.click()
    page.wait_for_selector("#about:has-text('astronaut')")
    stroke(page, (512, 512), (0.4, 0.4), (0.5, 0.4))
    filled(page)


def test_transparency_stays_when_filled_in_the_browser(web_folders: dict[str, Path], opened: Open) -> None:
    """Clear and opaque pixels, inside the hole and outside; a canvas rounds what is half transparent."""
    size, buffer = (120, 160), io.BytesIO()
    image = Image.open(io.BytesIO(photograph(size))).convert("RGBA")
    alpha = np.full(size, 255, np.uint8)
    alpha[:, 80:] = 0
    image.putalpha(Image.fromarray(alpha))
    image.save(buffer, "PNG")
    with served(web_folders["fp16"]) as site:
        page = opened(site.url)
        isolated(page)
        give(page, "cut-out.png", buffer.getvalue())
        stroke(page, size, (0.3, 0.5), (0.6, 0.5))
        filled(page)
        _, result = downloaded(page)
    found, given = np.asarray(Image.open(io.BytesIO(result))), np.asarray(image)
    np.testing.assert_array_equal(found[..., 3], alpha)
    changed = (found != given)[:, :80, :3].any(axis=-1)
    assert changed[60, 60]
    assert not changed[:45].any()
    assert not changed[75:].any()


def test_the_edge_is_feathered_in_the_browser(web_folders: dict[str, Path], opened: Open, inpainter: Inpainter) -> None:
    """The fill of the hole and a ring around it, blended by distance: as NumPy blends what Inpainter fills."""
    size, pixels_around = (200, 260), 9
    data = photograph(size)
    with served(web_folders["fp16"]) as site:
        page = opened(site.url)
        isolated(page)
        give(page, "cup.png", data)
        page.keyboard.press("r")
        stroke(page, size, (0.3, 0.4), (0.6, 0.5))
        page.fill("#feather", str(pixels_around))
        filled(page)
        _, result = downloaded(page)
    before, after = pixels(data).astype(np.float64), pixels(result).astype(np.float64)
    hole = np.zeros(size, np.bool_)
    hole[80:100, 78:156] = True
    weights = np.clip(1 - distance_transform_edt(~hole) / (pixels_around + 1), 0, 1)
    fill = inpainter.inpaint(pixels(data), weights > 0).astype(np.float64)
    expected = weights[..., None] * fill + (1 - weights[..., None]) * before
    np.testing.assert_array_equal(after[weights == 0], before[weights == 0])
    assert np.abs(after - expected).max() <= 1
    assert np.abs(after - fill)[weights > 0].max() > 5  # blended it is


def test_a_jpeg_filled_in_the_browser_stays_a_jpeg_and_the_page_says_what_is_lost(
    web_folders: dict[str, Path], opened: Open
) -> None:
    exif = Image.Exif()
    exif[0x010F] = "camera"
    data = photograph((200, 320), format="JPEG", quality=90, exif=exif)
    with served(web_folders["fp16"]) as site:
        page = opened(site.url)
        isolated(page)
        give(page, "cup.jpg", data)
        assert "EXIF" in page.inner_text("#note")
        stroke(page, (200, 320), (0.5, 0.2), (0.6, 0.3))
        filled(page)
        name, result = downloaded(page)
    assert name == "cup_filled.jpg"
    with Image.open(io.BytesIO(result)) as image:
        assert (image.format, image.size) == ("JPEG", (320, 200))
        assert not image.getexif()


class Watched(PillowCanvas):
    """A canvas that keeps the fills as the network gave them, before they become bytes."""

    def __init__(self, image: Image.Image):
        super().__init__(image)
        self.fills: NDArray[np.float32] = np.zeros((*self.size, 3), np.float32)

    def paste(self, box: Box, fill: Pixels, hole: Mask, weights: NDArray[np.float32] | None = None) -> None:
        self.fills[box.slices][hole] = fill[hole]
        super().paste(box, fill, hole, weights)


IN_THE_PAGE = """async ([image, boxes, width, height, runs]) => {
  const { openPicture } = await import("./js/picture.js");
  const { fillInBrowser } = await import("./js/browser.js");
  const bytes = Uint8Array.from(atob(image), (letter) => letter.charCodeAt(0));
  const picture = await openPicture(new Blob([bytes]), "x.png");
  const { network } = await (await fetch("page.json")).json();
  const data = new Uint8Array(width * height);
  for (const [top, left, bottom, right] of boxes) {
    for (let y = top; y < bottom; y++) data.fill(1, y * width + left, y * width + right);
  }
  const fills = new Float32Array(width * height * 3);
  const seconds = [];
  for (let run = 0; run < runs; run++) {
    const answer = await fillInBrowser({
      network, picture, mask: { data, width, height }, strategy: "auto", grow: 0, feather: 0,
      signal: new AbortController().signal, say() {}, show() {},
      exact({ box, shares, exact }) {
        const across = box.right - box.left;
        shares.forEach((share, at) => {
          const to = ((box.top + Math.floor(at / across)) * width + box.left + (at % across)) * 3;
          if (share) fills.set(exact.subarray(at * 3, at * 3 + 3), to);
        });
      },
    });
    seconds.push(answer.seconds);
  }
  const url = await new Promise((resolve) => {
    const reader = Object.assign(new FileReader(), { onload: () => resolve(reader.result) });
    reader.readAsDataURL(new Blob([fills.filter((_, at) => data[Math.floor(at / 3)])]));
  });
  return { seconds, fills: url.split(",")[1] };
}"""


@pytest.mark.parametrize(("precision", "least_db"), [("fp32", 100), ("fp16", 75)])
def test_the_browser_computes_what_python_computes(
    web_folders: dict[str, Path], opened: Open, precision: str, least_db: float
) -> None:
    """Squares of 256 and 512, and a photograph of 3000x2000 with holes that are seen as they are and reduced."""
    reference = Inpainter(web_folders[precision] / "network.onnx", backend="onnxruntime")
    with served(web_folders[precision]) as site:
        page = opened(site.url)
        isolated(page)
        for height, width, runs in ((256, 256, 3), (512, 512, 3), (2000, 3000, 2)):
            boxes = [(height // 3, width // 4, height // 2, width // 2)]
            if height == 2000:
                boxes = [(300, 500, 400, 620), (1100, 1500, 1700, 2150)]  # the second is wide: seen reduced
            mask = np.zeros((height, width), np.bool_)
            for top, left, bottom, right in boxes:
                mask[top:bottom, left:right] = True
            data = photograph((height, width), compress_level=1)
            canvas = Watched(Image.open(io.BytesIO(data)))
            reference.fill(canvas, mask)
            answer = page.evaluate(IN_THE_PAGE, [base64.b64encode(data).decode(), boxes, width, height, runs])
            error = np.frombuffer(base64.b64decode(answer["fills"]), np.float32).reshape(-1, 3) - canvas.fills[mask]
            psnr = -10 * np.log10(np.mean(np.square(error)) + 1e-30)
            times = ", ".join(f"{seconds:.2f}" for seconds in answer["seconds"])
            print(f"{precision} {width}x{height}: {psnr:.1f} dB, largest {np.abs(error).max():.1e}; {times} s")
            assert psnr > least_db


def test_pictures_of_the_page_for_the_documents(site: Site, opened: Open, tmp_path: Path) -> None:
    """docs/page-light.jpg and page-dark.jpg; written there with MISF_SCREENSHOTS=1."""
    folder = ROOT / "docs" if os.environ.get("MISF_SCREENSHOTS") else tmp_path
    for scheme in ("light", "dark"):
        page = opened(site.url, color_scheme=scheme, viewport={"width": 1120, "height": 700})
        page.locator("#samples button").nth(3).click()
        page.wait_for_selector("#about:has-text('rocket')")
        size, towers = (
            (427, 640),
            [[(200, 122), (199, 200), (192, 300), (188, 360)], [(447, 122), (452, 210), (459, 380)]],
        )
        page.fill("#size", "58")
        for tower in towers:
            stroke(page, size, *((x / size[1], y / size[0]) for x, y in tower))
        if scheme == "dark":
            filled(page)
            page.click("#compare")
        page.mouse.move(5, 400)
        page.wait_for_timeout(300)
        path = folder / f"page-{scheme}.jpg"
        page.screenshot(path=path, type="jpeg", quality=82)
        assert path.stat().st_size < 150_000


def test_a_sample_is_filled_on_misf_serve(opened: Open) -> None:
    """The real server, with its headers, its content security policy and its limits."""
    with serving(Path("misf-small")) as client:
        page = opened(str(client.base_url))
        assert page.evaluate("crossOriginIsolated")
        with Image.open(SAMPLES / "chelsea.jpg") as sample:
            size, before = (sample.height, sample.width), np.asarray(sample.convert("RGB"))
        page.click("#samples button:has(img[src*='chelsea'])")
        page.wait_for_selector("#about:has-text('chelsea')")
        stroke(page, size, (0.4, 0.4), (0.55, 0.45))
        filled(page)
        name, data = downloaded(page)
        after = pixels(data)
    assert Path(name).suffix == ".jpg"
    assert after.shape == before.shape
    changed = np.abs(after.astype(int) - before).max(axis=2) > 40
    assert changed.any()
    rows, columns = np.nonzero(changed)
    assert (rows.min(), columns.min()) > (size[0] * 0.2, size[1] * 0.2)
    assert (rows.max(), columns.max()) < (size[0] * 0.7, size[1] * 0.8)
