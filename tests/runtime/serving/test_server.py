"""The contract of misf-serve, asked over HTTP of a real server: plain routes, IOPaint's, limits, load, health."""

from __future__ import annotations

import asyncio
import base64
import gc
import json
import logging
import socket
import threading
import time
import weakref
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image
from starlette.datastructures import UploadFile

from misf import runtime
from misf.runtime import Inpainter
from misf.runtime.inpainter import FillReport
from misf.runtime.pictures.image_io import open_mask
from misf.runtime.run_cli import main as misf_run
from misf.runtime.serving import filling, observing
from misf.runtime.serving.failures import RequestError
from misf.runtime.serving.filling import Filled, Filler
from tests.support.serving import encoded, gated, opened, png, serving, until
from tests.support.tiny_models import mean_fill

SIZE = (48, 64)
HOLE = np.zeros(SIZE, np.uint8)
HOLE[10:20, 30:44] = 255
FAILURE = {"error", "detail", "body", "errors"}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return mean_fill(tmp_path_factory.mktemp("model") / "mean.onnx")


@pytest.fixture(scope="module")
def client(model: Path) -> Iterator[httpx.Client]:
    with serving(model, max_pixels=200_000, max_bytes=1 << 20) as client:
        yield client


@pytest.fixture
def picture(rng: np.random.Generator) -> Any:
    return rng.integers(0, 256, (*SIZE, 3), np.uint8)


def uri(data: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(data).decode()


def filled_by_hand(picture: Any, hole: Any) -> Any:
    """The mean of the known pixels in the hole: what the model in these tests does."""
    result = picture.copy()
    result[hole] = np.rint(picture[~hole].mean(axis=0))
    return result


def is_failure(answer: httpx.Response, status: int, words: str) -> None:
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/json"
    assert answer.text.count("\n") == 1
    assert answer.text.endswith("\n")
    body = answer.json()
    assert set(body) == FAILURE
    assert words in body["detail"] == body["errors"]


def test_a_picture_comes_back_filled(client: httpx.Client, picture: Any) -> None:
    answer = client.post("/inpaint", files={"image": png(picture), "mask": png(HOLE)})
    assert answer.status_code == 200, answer.text
    assert answer.headers["content-type"] == "image/png"
    assert answer.headers["x-precision"] == "fp32"
    assert float(answer.headers["x-process-time"]) > 0
    result = np.asarray(opened(answer.content))
    assert np.array_equal(result[HOLE == 0], picture[HOLE == 0])
    np.testing.assert_allclose(result, filled_by_hand(picture, HOLE > 0), atol=1)


def test_the_answer_is_the_file_that_misf_run_writes(model: Path, tmp_path: Path) -> None:
    from click.testing import CliRunner

    samples = Path(runtime.__file__).parent / "samples"
    image, mask, target = samples / "astronaut.jpg", samples / "masks" / "astronaut.png", tmp_path / "filled.jpg"
    arguments = [str(model), str(image), str(mask), "-o", str(target), "--backend=onnxruntime", "--grow-mask=3"]
    assert CliRunner().invoke(misf_run, arguments).exit_code == 0
    with serving(model) as roomy:
        answer = roomy.post("/inpaint?grow=3", files={"image": image.read_bytes(), "mask": mask.read_bytes()})
    assert answer.headers["content-type"] == "image/jpeg"
    assert answer.content == target.read_bytes()


def test_format_exif_profile_and_alpha_are_kept(client: httpx.Client, picture: Any) -> None:
    from PIL import ImageCms

    exif = Image.Exif()
    exif[0x0112], exif[0x010E] = 6, "a description"  # turned by 90 degrees
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    jpeg = encoded(Image.fromarray(picture), "JPEG", exif=exif, icc_profile=profile, quality=90)
    answer = client.post("/inpaint", files={"image": jpeg, "mask": png(HOLE.T)})  # for the picture as displayed
    result = opened(answer.content)
    assert (result.format, result.size, result.getexif()[0x0112], result.getexif()[0x010E]) == (
        *("JPEG", (SIZE[1], SIZE[0]), 6),
        "a description",
    )
    assert result.info["icc_profile"] == profile
    alpha = np.dstack([picture, np.arange(SIZE[1], dtype=np.uint8)[None].repeat(SIZE[0], 0)])
    answer = client.post(
        "/inpaint",
        files={"image": encoded(Image.fromarray(alpha), "WEBP", lossless=True, exact=True), "mask": png(HOLE)},
    )
    assert answer.headers["content-type"] == "image/webp"
    assert np.array_equal(np.asarray(opened(answer.content))[..., 3], alpha[..., 3])


def test_json_where_it_is_accepted(client: httpx.Client, picture: Any) -> None:
    files = {"image": png(picture), "mask": png(HOLE)}
    answer = client.post("/inpaint", files=files, headers={"Accept": "application/json"})
    facts = answer.json()
    raw = client.post("/inpaint", files=files, headers={"Accept": "image/*, application/json;q=0.5"})
    assert base64.b64decode(facts.pop("image")) == raw.content
    assert facts.pop("model_seconds") >= 0
    assert facts == {
        "media_type": "image/png",
        "width": SIZE[1],
        "height": SIZE[0],
        "strategy": "original",
        "crops": 1,
        "hole_pixels": int((HOLE > 0).sum()),
    }


def test_feather_and_values(client: httpx.Client, picture: Any) -> None:
    labels = np.zeros(SIZE, np.uint8)
    labels[10:20, 30:44], labels[30:34, 5:9], labels[40:44, 50:54] = 1, 2, 3
    files = {"image": png(picture), "mask": png(labels)}
    answer = client.post("/inpaint?values=1&values=3", files=files)
    changed = (np.asarray(opened(answer.content)) != picture).any(axis=2)
    assert not changed[(labels == 0) | (labels == 2)].any()
    assert changed[(labels == 1) | (labels == 3)].mean() > 0.9
    answer = client.post("/inpaint?feather=4", files={"image": png(picture), "mask": png(HOLE)})
    changed = (np.asarray(opened(answer.content)) != picture).any(axis=2)
    assert changed[20:23, 30:44].mean() > 0.5  # below the hole, where the fill blends in
    assert not changed[26:].any()


@pytest.mark.parametrize(
    ("query", "hole"),
    [
        ("invert=true", HOLE == 0),
        ("threshold=254", HOLE > 254),
        ("grow=2", None),
        ("strategy=crop&margin=0", HOLE > 0),
        ("strategy=resize", HOLE > 0),
    ],
)
def test_options_come_as_a_query(client: httpx.Client, picture: Any, query: str, hole: Any) -> None:
    if hole is None:
        from scipy.ndimage import binary_dilation

        disc = np.hypot(*np.mgrid[-2:3, -2:3]) <= 2
        hole = binary_dilation(HOLE > 0, disc)
    answer = client.post(f"/inpaint?{query}", files={"image": png(picture), "mask": png(HOLE)})
    changed = (np.asarray(opened(answer.content)) != picture).any(axis=2)
    assert not changed[~hole].any()
    assert changed[hole].mean() > 0.9


def test_a_mask_of_another_size(client: httpx.Client, picture: Any) -> None:
    files = {"image": png(picture), "mask": png(HOLE[::2, ::2])}
    is_failure(client.post("/inpaint", files=files), 400, "the mask is 32x24 and the picture 64x48")
    answer = client.post("/inpaint?resize=true", files=files)
    assert np.array_equal((np.asarray(opened(answer.content)) != picture).any(axis=2) & (HOLE == 0), HOLE < 0)


def test_an_empty_mask_gives_the_very_file(client: httpx.Client, picture: Any) -> None:
    data = encoded(Image.fromarray(picture), "JPEG")
    assert client.post("/inpaint", files={"image": data, "mask": png(HOLE * 0)}).content == data


# ------------------------------------------------------------------------------------------------ IOPaint


def iopaint_mask(strokes: Any, ring: Any) -> bytes:
    """A mask as IOPaint's page sends it: white on transparent black, with edges that are faint but white."""
    rgba = np.zeros((*SIZE, 4), np.uint8)
    rgba[strokes] = 255
    rgba[ring] = (255, 255, 255, 40)
    return png(rgba)


def test_iopaint_s_client_with_all_its_keys(client: httpx.Client, picture: Any) -> None:
    ring = np.zeros(SIZE, np.bool_)
    ring[9, 30:44] = True
    payload = {
        "image": uri(png(picture)),
        "mask": uri(iopaint_mask(HOLE > 0, ring)),
        "hd_strategy": "Crop",
        "hd_strategy_crop_triger_size": 640,
        "hd_strategy_crop_margin": 128,
        "hd_trategy_resize_imit": 2048,
        "sd_seed": -1,
        "croper_x": -64,
        "prompt": None,
        "use_croper": False,
        "controlnet_method": None,
        "cv2_flag": "INPAINT_NS",
        "enable_brushnet": None,
    }
    answer = client.post("/api/v1/inpaint", json=payload)
    assert answer.status_code == 200, answer.text
    assert answer.headers["content-type"] == "image/png"
    assert answer.headers["x-seed"] == "0"
    result = np.asarray(opened(answer.content))
    np.testing.assert_allclose(result, filled_by_hand(picture, (HOLE > 0) | ring), atol=1)
    plain = payload | {"image": base64.b64encode(encoded(Image.fromarray(picture), "JPEG")).decode(), "sd_seed": 42}
    answer = client.post("/api/v1/inpaint", json=plain)
    assert (answer.headers["content-type"], answer.headers["x-seed"]) == ("image/jpeg", "42")


@pytest.mark.parametrize(
    ("changes", "status", "words"),
    [
        ({"image": None}, 422, "image: Input should be a valid string"),
        ({"mask": 3}, 422, "mask: Input should be a valid string"),
        ({"image": "data:image/png;base64,abc"}, 422, "image is not base64"),
        ({"image": "bm8gcGljdHVyZQ=="}, 415, "the picture is not a picture we can read"),
        ({"mask": uri(png(HOLE[:-1]))}, 400, "the mask is 64x47 and the picture 64x48"),
        ({"hd_strategy": {"a": []}, "sd_seed": "x" * 99}, 200, ""),
    ],
)
def test_iopaint_s_failures(client: httpx.Client, picture: Any, changes: Any, status: int, words: str) -> None:
    answer = client.post("/api/v1/inpaint", json={"image": uri(png(picture)), "mask": uri(png(HOLE))} | changes)
    if status == 200:
        assert answer.status_code == 200
    else:
        is_failure(answer, status, words)


def test_iopaint_s_small_routes(client: httpx.Client) -> None:
    config = client.get("/api/v1/server-config").json()
    assert set(config) >= {"plugins", "modelInfos", "removeBGModels", "enableFileManager", "samplers", "isDesktop"}
    [info] = config["modelInfos"]
    assert info == client.get("/api/v1/model").json()
    assert (info["name"], info["model_type"], info["need_prompt"]) == ("mean", "inpaint", False)
    assert client.post("/api/v1/model", json={"name": "mean"}).json() == info
    is_failure(client.post("/api/v1/model", json={"name": "lama"}), 422, "has the model mean only")
    is_failure(client.get("/api/v1/inputimage"), 200, "without a picture")
    prompts = client.post("/api/v1/gen-info", files={"file": png(HOLE)}).json()
    assert prompts == {"prompt": "", "negative_prompt": ""}
    assert client.get("/api/v1/samplers").json() == []
    is_failure(client.post("/api/v1/save_image", files={"file": png(HOLE)}), 400, "saves nothing")
    plugin = {"name": "RemoveBG", "image": "x", "clicks": [], "scale": 1.0}
    is_failure(client.post("/api/v1/run_plugin_gen_mask", json=plugin), 422, "Plugin not found")
    is_failure(client.get("/socket.io/?EIO=4"), 404, "Not Found")


@pytest.mark.parametrize("operate", ["expand", "shrink", "reverse"])
def test_adjust_mask_is_opencv_s_ellipse_but_for_a_pixel(client: httpx.Client, operate: str) -> None:
    import cv2

    answer = client.post("/api/v1/adjust_mask", json={"mask": uri(png(HOLE)), "operate": operate, "kernel_size": 3})
    painted = np.asarray(opened(answer.content))
    assert painted.shape == (*SIZE, 4)
    mask = painted[..., 3] > 0
    assert {tuple(pixel) for pixel in painted[mask]} == {(255, 203, 0, 186)}
    assert not painted[~mask].any()

    def kernel(radius: int) -> Any:
        return cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (2 * radius + 1, 2 * radius + 1))

    if operate == "reverse":
        assert np.array_equal(mask, HOLE == 0)
        return
    change = cv2.dilate if operate == "expand" else cv2.erode
    less, more = (change(HOLE, kernel(radius)) > 0 for radius in (2, 3))
    inner, outer = (less, more) if operate == "expand" else (more, less)
    assert (mask & inner).sum() == inner.sum()
    assert (mask & outer).sum() == mask.sum()
    again = client.post("/api/v1/adjust_mask", json={"mask": uri(answer.content), "operate": "reverse"})
    assert np.array_equal(np.asarray(opened(again.content))[..., 3] > 0, ~mask)  # its yellow is hole


def test_a_wrong_method_is_not_an_unknown_path(client: httpx.Client) -> None:
    for path in ("/inpaint", "/api/v1/inpaint"):
        answer = client.get(path)
        is_failure(answer, 405, "Method Not Allowed")
        assert answer.headers["allow"] == "POST"
    is_failure(client.post("/"), 405, "Method Not Allowed")
    is_failure(client.get("/inpaint/"), 404, "Not Found")


# ------------------------------------------------------------------------------------------------ limits


def test_too_many_bytes_are_refused_before_they_are_read(client: httpx.Client) -> None:
    is_failure(client.post("/inpaint", content=b"x" * (2 << 20)), 413, "at most 1048576 bytes")
    chunks = (b"x" * 65536 for _ in range(64))
    is_failure(client.post("/inpaint", content=chunks), 413, "at most 1048576 bytes")  # without a length
    with socket.create_connection((client.base_url.host, client.base_url.port or 0)) as polite:
        polite.sendall(b"POST /inpaint HTTP/1.1\r\nHost: x\r\nExpect: 100-continue\r\nContent-Length: 2000000\r\n\r\n")
        polite.settimeout(10)
        assert polite.recv(4096).startswith(b"HTTP/1.1 413 ")  # not 100


def test_too_many_pixels_are_refused_before_they_are_decoded(client: httpx.Client, picture: Any) -> None:
    from misf.runtime.pictures import image_io

    huge = png(np.zeros((500, 500), np.uint8))
    for files in ({"image": huge, "mask": png(HOLE)}, {"image": png(picture), "mask": huge}):
        is_failure(client.post("/inpaint", files=files), 413, "500x500: expected at most 200000 pixels")
    assert image_io.FORMATS  # the decoder itself takes more


def test_masks_larger_than_their_pictures_are_decoded_within_the_same_limit(
    client: httpx.Client, picture: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The limit is 200,000 pixels, and twice as many at a time; these masks have 193,600."""
    large = np.full((440, 440), 255, np.uint8)
    lock, now, most = threading.Lock(), 0, 0

    def slow(path: Path, data: bytes) -> Image.Image:
        nonlocal now, most
        with lock:
            now += 1
            most = max(most, now)
        time.sleep(0.3)
        with lock:
            now -= 1
        return open_mask(path, data)

    monkeypatch.setattr(filling, "open_mask", slow)
    with ThreadPoolExecutor(4) as pool:
        files = {"image": png(picture), "mask": png(large)}
        answers = [pool.submit(client.post, "/inpaint", files=files) for _ in range(4)]
        for answer in answers:
            is_failure(answer.result(), 400, "the mask is 440x440")
        assert most <= 2
        wish = {"mask": uri(png(large)), "operate": "reverse"}
        answers = [pool.submit(client.post, "/api/v1/adjust_mask", json=wish) for _ in range(4)]
        assert [answer.result().status_code for answer in answers] == [200] * 4
        assert most <= 2


def test_the_strategy_original_has_a_limit_of_its_own(model: Path) -> None:
    large = np.zeros((2100, 2100), np.uint8)
    large[5:9, 5:9] = 255
    with serving(model) as client:
        files = {"image": png(large), "mask": png(large)}
        is_failure(client.post("/inpaint?strategy=original", files=files), 413, "too many for the strategy original")
        assert client.post("/inpaint", files=files).status_code == 200


def test_token(model: Path, picture: Any) -> None:
    secret = "correct h\u00f6rse battery"
    with serving(model, token=secret) as client:
        files = {"image": png(picture), "mask": png(HOLE)}
        basic, right = ({"Authorization": f"{scheme} {secret}".encode()} for scheme in ("Basic", "bearer"))
        for headers in ({}, {"Authorization": "Bearer wrong"}, basic):
            answer = client.post("/inpaint", files=files, headers=headers)
            is_failure(answer, 401, "Authorization: Bearer")
            assert answer.headers["www-authenticate"] == "Bearer"
        for path in ("/api/v1/model", "/metrics", "/openapi.json"):
            assert client.get(path).status_code == 401
        assert client.get("/healthz").status_code == client.get("/readyz").status_code == 200
        assert client.post("/inpaint", files=files, headers=right).status_code == 200
        assert "HTTPBearer" in client.get("/openapi.json", headers=right).text


def test_hosts_and_origins(model: Path) -> None:
    origin = {"Origin": "https://example.org"}
    with serving(model, hosts=("127.0.0.1", "Proxy.example"), cors=("https://example.org",)) as client:
        assert client.get("/api/v1/model", headers={"Host": "proxy.example:443"}).status_code == 200
        is_failure(client.get("/api/v1/model", headers={"Host": "rebound.example:80"}), 400, "--allowed-host")
        answer = client.get("/api/v1/model", headers=origin)
        assert answer.headers["access-control-allow-origin"] == "https://example.org"
        assert "X-Seed" in answer.headers["access-control-expose-headers"]
        assert "access-control-allow-origin" not in client.get("/healthz", headers={"Origin": "https://evil"}).headers
    with serving(model) as client:
        assert "access-control-allow-origin" not in client.get("/api/v1/model", headers=origin).headers


# ------------------------------------------------------------------------------------------------ load


def test_a_full_queue_answers_503_and_when_to_come_again(model: Path, picture: Any) -> None:
    inpainter, gate = gated(model)
    files = {"image": png(picture), "mask": png(HOLE)}
    with serving(model, inpainter, queue=3) as client, ThreadPoolExecutor(3) as pool:
        gate.gate.clear()
        waiting = [pool.submit(client.post, "/inpaint", files=files) for _ in range(3)]
        until(lambda: client.get("/readyz").status_code == 503)
        answer = client.post("/inpaint", files=files)
        is_failure(answer, 503, "3 requests wait already")
        assert 1 <= int(answer.headers["retry-after"]) <= 60
        is_failure(client.get("/readyz"), 503, "the queue is full")
        assert client.get("/healthz").status_code == 200
        gate.gate.set()
        assert [future.result(30).status_code for future in waiting] == [200] * 3
        until(lambda: client.get("/readyz").status_code == 200)


def test_requests_of_one_size_share_runs_and_each_gets_its_own_answer(model: Path, rng: np.random.Generator) -> None:
    inpainter, gate = gated(model)
    pictures = rng.integers(0, 256, (9, *SIZE, 3), np.uint8)
    with serving(model, inpainter, max_batch=8) as client, ThreadPoolExecutor(9) as pool:
        gate.gate.clear()
        gate.entered.clear()

        def fill(picture: Any) -> httpx.Response:
            return client.post("/inpaint", files={"image": png(picture), "mask": png(HOLE)})

        futures = [pool.submit(fill, pictures[0])]
        assert gate.entered.wait(30)
        futures += [pool.submit(fill, picture) for picture in pictures[1:]]
        batching: Any = inpainter.backend
        until(lambda: len(batching._calls) == 8)
        gate.gate.set()
        for picture, future in zip(pictures, futures, strict=True):
            result = np.asarray(opened(future.result(30).content))
            np.testing.assert_allclose(result, filled_by_hand(picture, HOLE > 0), atol=1)
        assert [shape[0] for shape in gate.shapes[-2:]] == [1, 8]
        counted = client.get("/metrics").text
    assert 'misf_batch_size_bucket{le="8.0"} 3.0' in counted  # with that of the warm-up
    assert 'misf_batch_size_bucket{le="6.0"} 2.0' in counted


def test_a_server_whose_model_has_ended_is_not_healthy(model: Path) -> None:
    inpainter, _ = gated(model)
    with serving(model, inpainter) as client:
        assert client.get("/healthz").status_code == 200
        inpainter.backend.close()
        for route in ("/healthz", "/readyz"):
            is_failure(client.get(route), 503, "the model does not run")


def test_a_server_whose_model_fails_at_everything_is_not_healthy(model: Path, picture: Any) -> None:
    """After some errors a GPU answers nothing until the process is started again."""
    inpainter, gate = gated(model)
    files = {"image": png(picture), "mask": png(HOLE)}
    with serving(model, inpainter) as client:
        for fails_on, health in (
            (lambda image: image.any(), 200),  # this picture alone, not the dark one of the warm-up
            (lambda _image: True, 503),
            (lambda _image: False, 200),
        ):
            gate.fails_on = fails_on
            assert client.post("/inpaint", files=files).status_code == (200 if not fails_on(picture) else 500)
            for route in ("/healthz", "/readyz"):
                assert client.get(route).status_code == health


def test_a_deadline_ends_a_request_and_the_next_one_is_served(model: Path, picture: Any) -> None:
    inpainter, gate = gated(model)
    files = {"image": png(picture), "mask": png(HOLE)}
    with serving(model, inpainter, timeout=3) as client:  # a busy machine may need a second for the body
        gate.gate.clear()
        started = time.monotonic()
        answer = client.post("/inpaint", files=files)
        is_failure(answer, 504, "not finished within 3 s")
        assert time.monotonic() - started < 30
        gate.gate.set()
        until(lambda: client.post("/inpaint", files=files).status_code == 200)


def test_a_client_that_leaves_makes_room(model: Path, picture: Any) -> None:
    inpainter, gate = gated(model)
    files = {"image": png(picture), "mask": png(HOLE)}
    with serving(model, inpainter, queue=2) as client:
        gate.gate.clear()
        gate.entered.clear()
        for _ in range(2):
            with pytest.raises(httpx.ReadTimeout):
                client.post("/inpaint", files=files, timeout=1.5)
        assert gate.entered.wait(30)
        until(lambda: 'status="499"} 2.0' in client.get("/metrics").text)  # the server has noticed both
        gate.gate.set()
        until(lambda: client.get("/readyz").status_code == 200)
        assert client.post("/inpaint", files=files).status_code == 200
    assert len(gate.shapes) == 3  # the warm-up, the one in the model, the last: never the one that only waited


def test_a_request_that_is_given_up_holds_no_picture_while_it_waits_for_a_thread(model: Path) -> None:
    inpainter, _ = gated(model)
    filler = Filler(
        inpainter, queue=64, timeout=60, max_pixels=9, max_batch=1, batch_delay=0, metrics=observing.Metrics()
    )
    gate = threading.Event()

    async def stays() -> Any:
        await asyncio.Event().wait()

    async def leaves() -> Any:
        return {"type": "http.disconnect"}

    async def ask() -> None:
        busy = [asyncio.create_task(filler.run(stays, "", gate.wait)) for _ in range(5)]
        await asyncio.sleep(0.1)
        picture = np.zeros(9)
        held = weakref.ref(picture)
        with pytest.raises(RequestError, match="the client left"):
            await filler.run(leaves, "", picture.sum)
        del picture
        gc.collect()
        still_there = held() is not None
        gate.set()
        assert await asyncio.gather(*busy) == [True] * 5
        assert not still_there

    asyncio.run(ask())
    filler.close()


def test_an_upload_is_in_memory_once_while_it_waits(model: Path, picture: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    closed = []
    monkeypatch.setattr(Filler, "fill", lambda *_: closed.extend(file.file.closed for file in uploads) or _filled())
    uploads: list[UploadFile] = []
    read = UploadFile.read

    async def noted(file: UploadFile, size: int = -1) -> bytes:
        uploads.append(file)
        return await read(file, size)

    monkeypatch.setattr(UploadFile, "read", noted)
    with serving(model) as client:
        assert client.post("/inpaint", files={"image": png(picture), "mask": png(HOLE)}).status_code == 200
    assert closed == [True, True]


def _filled() -> Filled:
    return Filled(b"", "image/png", 1, 1, FillReport("auto", 1, 1, 0.0))


def test_a_thread_that_cannot_be_started_leaves_no_place_taken(
    model: Path, picture: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def none_left(_pool: ThreadPoolExecutor) -> None:
        raise RuntimeError("can't start new thread")

    files = {"image": png(picture), "mask": png(HOLE)}
    with serving(model, queue=1) as client:
        with monkeypatch.context() as patched:
            patched.setattr(ThreadPoolExecutor, "_adjust_thread_count", none_left)
            is_failure(client.post("/inpaint", files=files), 500, "the server failed")
        until(lambda: client.get("/readyz").status_code == 200, 5)
        assert client.post("/inpaint", files=files).status_code == 200


def test_a_slow_body_is_given_up(model: Path) -> None:
    with (
        serving(model, timeout=0.5) as client,
        socket.create_connection((client.base_url.host, client.base_url.port or 0)) as slow,
    ):
        slow.sendall(b"POST /inpaint HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\nabc")
        slow.settimeout(10)
        answer = b""
        while part := slow.recv(4096):
            answer += part
        assert answer.startswith(b"HTTP/1.1 408 ")
        assert json.loads(answer.partition(b"\r\n\r\n")[2])["detail"] == "the body did not arrive within 0.5 s"


def test_headers_that_do_not_come_are_given_up(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from misf.runtime.serving import protocol

    monkeypatch.setattr(protocol, "HEADER_SECONDS", 1.5)
    with serving(model) as client:
        address = (client.base_url.host, client.base_url.port or 0)
        for head in (b"", b"GET /healthz HTTP/1.1\r\nHost: x\r\n"):
            with socket.create_connection(address) as idle:
                idle.sendall(head)
                idle.settimeout(10)
                assert idle.recv(100) == b""
        with socket.create_connection(address) as kept:  # one that sends further requests on time
            kept.settimeout(10)
            for _ in range(3):
                kept.sendall(b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n")
                answer = b""
                while not answer.endswith(b'{"status":"ok"}'):
                    answer += kept.recv(4096)
                time.sleep(0.6)
            kept.sendall(b"GET /healthz HT")
            assert kept.recv(4096) == b""


@pytest.mark.skipif(not hasattr(socket, "TCP_USER_TIMEOUT"), reason="Linux closes such connections")
def test_an_answer_that_nobody_reads_is_given_up(
    model: Path, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    from misf.runtime.serving import serve_cli

    monkeypatch.setattr(serve_cli, "UNREAD_SECONDS", 1)
    noise = rng.integers(0, 256, (2000, 2000, 3), np.uint8)
    hole = np.zeros((2000, 2000), np.uint8)
    hole[:8, :8] = 255
    with serving(model) as client, socket.socket() as idle:
        request = client.build_request(
            "POST", "/inpaint", files={"image": png(noise, compress_level=0), "mask": png(hole)}
        )
        head = f"POST /inpaint HTTP/1.1\r\nHost: x\r\nContent-Type: {request.headers['content-type']}\r\n"
        body = request.read()
        idle.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        idle.settimeout(20)
        idle.connect((client.base_url.host, client.base_url.port or 0))
        idle.sendall(head.encode() + b"Content-Length: %d\r\n\r\n" % len(body) + body)
        assert idle.recv(12) == b"HTTP/1.1 200"
        time.sleep(3)
        with pytest.raises(ConnectionError):
            sum(map(len, iter(lambda: idle.recv(1 << 20), b"")))  # what the system had taken, and then no end of file


def test_what_the_model_fails_with_stays_in_the_log(
    model: Path, picture: Any, caplog: pytest.LogCaptureFixture
) -> None:
    inpainter, gate = gated(model)
    gate.fails_on = lambda image: image.shape[2:] == SIZE
    misf = logging.getLogger("misf")
    misf.addHandler(caplog.handler)
    try:
        with serving(model, inpainter) as client:
            answer = client.post("/inpaint", files={"image": png(picture), "mask": png(HOLE)})
            is_failure(answer, 500, "the server failed")
            assert "secret" not in answer.text
            assert len(answer.headers["x-request-id"]) == 12
    finally:
        misf.removeHandler(caplog.handler)
    assert any("/secret/path" in record.getMessage() for record in caplog.records)


def test_a_small_answer_does_not_wait_for_an_acknowledgement(client: httpx.Client) -> None:
    """Headers and body in two packets on a socket without TCP_NODELAY take 40 ms."""
    seconds = []
    for _ in range(20):
        started = time.perf_counter()
        client.get("/healthz")
        seconds.append(time.perf_counter() - started)
    assert sorted(seconds)[5] < 0.03


def test_metrics_count_what_happened(model: Path, picture: Any) -> None:
    with serving(model, max_bytes=1_000_000) as client:
        client.post("/inpaint", content=bytes(1_000_001))
        for _ in range(2):
            client.post("/inpaint", files={"image": png(picture), "mask": png(HOLE)})
        client.get("/no/such/thing/made/up/by/a/client")
        lines = client.get("/metrics").text.splitlines()
    values = {name: float(value) for name, value in (line.rsplit(" ", 1) for line in lines if line[0] != "#")}
    assert values['misf_requests_total{route="/inpaint",status="200"}'] == 2
    assert values['misf_requests_total{route="/inpaint",status="413"}'] == 1
    assert values['misf_requests_total{route="other",status="404"}'] == 1
    assert values['misf_request_seconds_count{route="/inpaint"}'] == 3
    assert values["misf_requests_in_work"] == 0
    assert values["misf_batch_size_count"] == 3  # and the warm-up
    assert values['misf_bytes_total{direction="in"}'] > 2 * picture.size
    share = (HOLE > 0).mean()
    assert values["misf_hole_share_sum"] == pytest.approx(2 * share)


# ------------------------------------------------------------------------------------------------ the page


def test_the_page_is_served_with_types_and_headers(model: Path, tmp_path: Path) -> None:
    (tmp_path / "index.html").write_text("<!doctype html>")
    for name in ("a.mjs", "a.js", "a.wasm", "a.css"):
        (tmp_path / name).write_text("")
    (tmp_path / "page.json").write_text('{"server": false, "network": {"file": "x.onnx"}}')  # as misf-export --web does
    (tmp_path.parent / "secret.txt").write_text("secret")
    with serving(model, page=str(tmp_path)) as client:
        front = client.get("/")
        assert front.headers["content-type"].startswith("text/html")
        assert front.headers["cross-origin-opener-policy"] == "same-origin"
        assert front.headers["cross-origin-embedder-policy"] == "require-corp"
        assert front.headers["x-content-type-options"] == "nosniff"
        assert "default-src 'self'" in front.headers["content-security-policy"]
        types = {
            name: client.get(f"/{name}").headers["content-type"].split(";")[0]
            for name in ("a.mjs", "a.js", "a.wasm", "a.css")
        }
        assert types == {
            "a.mjs": "text/javascript",
            "a.js": "text/javascript",
            "a.wasm": "application/wasm",
            "a.css": "text/css",
        }
        assert client.get("/page.json").json() == {"server": True, "network": {"file": "x.onnx"}}
        for path in ("/../secret.txt", "/%2e%2e/secret.txt", "/..%2fsecret.txt", "//etc/passwd"):
            assert client.get(path).status_code == 404
        assert client.get("/api/v1/model").status_code == 200
    with serving(model, page=str(tmp_path / "missing")) as client:
        is_failure(client.get("/"), 404, "Not Found")


def test_an_inpainter_shared_by_requests_keeps_its_settings(model: Path, picture: Any) -> None:
    inpainter = Inpainter(model, backend="onnxruntime", device="cpu", threads=1)
    before = inpainter.settings
    with serving(model, inpainter) as client:
        client.post("/inpaint?strategy=resize&margin=3", files={"image": png(picture), "mask": png(HOLE)})
    assert inpainter.settings == before
