"""misf-batch on real clusters of one machine and a real S3 server: nothing twice, nothing lost, the same bytes."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from ...support.tiny_models import mean_fill

ray = pytest.importorskip("ray", reason="NOT PROVED: misf-batch needs the extra cluster")
pytestmark = [pytest.mark.slow, pytest.mark.timeout(280)]

BATCH = (sys.executable, "-m", "misf.runtime.batch.batch_cli")
RUN = (sys.executable, "-c", "from misf.runtime.run_cli import main; main()")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, 200 pictures in two folders with their masks, and what misf-run makes of them."""
    root = tmp_path_factory.mktemp("fleet")
    mean_fill(root / "model.onnx")
    rng = np.random.default_rng(0)
    hole = np.zeros((48, 64), np.uint8)
    hole[10:30, 20:50] = 255
    for number in range(200):
        place = Path("a" if number % 2 else "b/c") / f"{number:03d}.jpg"
        for name in ("in", "masks"):
            (root / name / place).parent.mkdir(parents=True, exist_ok=True)
        pixels = rng.integers(0, 256, (48, 64, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(root / "in" / place, quality=90)
        mask = place.with_name(f"{place.stem}_mask01.png" if number % 7 == 0 else f"{place.stem}.png")
        Image.fromarray(hole).save(root / "masks" / mask)
    done = call(RUN, root, "expected")
    assert done.returncode == 0, done.stderr
    return root


def arguments(root: Path, output: str, *more: str) -> list[str]:
    places = [str(root / name) for name in ("model.onnx", "in", "masks")]
    return [*places, "-o", output if "://" in output else str(root / output), "--backend", "onnxruntime", *more]


def call(command: tuple[str, ...], root: Path, output: str, *more: str, **options: Any) -> Any:
    return subprocess.run(
        [*command, *arguments(root, output, *more)], capture_output=True, text=True, timeout=200, **options
    )


def contents(folder: Path) -> dict[str, bytes]:
    """Return what is in the files of a folder, without the hidden ones that a killed process may leave."""
    files = (path for path in folder.rglob("*") if path.is_file() and not path.name.startswith(".misf-"))
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def records(report: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in report.read_text().splitlines()]


def workers() -> list[int]:
    """Return the process ids of the Ray workers that hold a model, not of those that still load it."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            text = path.read_bytes()
        except OSError:
            continue
        if text.startswith(b"ray::Worker") and b"__init__" not in text:
            found.append(int(path.parent.name))
    return found


def test_a_killed_worker_loses_nothing_and_does_nothing_twice(folder: Path, tmp_path: Path) -> None:
    report = tmp_path / "report.jsonl"
    command = [*BATCH, *arguments(folder, "filled", "--report", str(report))]
    running = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while not (report.exists() and len(records(report)) >= 5):
        assert time.monotonic() < deadline
        assert running.poll() is None, running.communicate()
        time.sleep(0.01)
    os.kill(workers()[0], signal.SIGKILL)
    _, stderr = running.communicate(timeout=200)
    assert running.returncode == 0, stderr
    assert "a worker died" in stderr or "a worker could not start" in stderr  # the one killed may still have loaded
    assert contents(folder / "filled") == contents(folder / "expected")
    assert sorted(record["input"] for record in records(report)) == sorted(map(str, (folder / "in").rglob("*.jpg")))
    assert {record["status"] for record in records(report)} <= {"done", "exists"}


def test_a_killed_driver_goes_on_where_it_was(folder: Path, tmp_path: Path) -> None:
    report = tmp_path / "report.jsonl"
    command = [*BATCH, *arguments(folder, "resumed", "--report", str(report))]
    running = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
    while not (report.exists() and len(report.read_text().splitlines()) >= 5):
        assert running.poll() is None
        time.sleep(0.01)
    os.kill(running.pid, signal.SIGKILL)
    running.wait()
    time.sleep(2)  # its workers notice
    before = {name: (folder / "resumed" / name).stat().st_mtime_ns for name in contents(folder / "resumed")}
    assert 0 < len(before) < 200
    (tmp_path / "second.jsonl").touch()
    done = call(BATCH, folder, "resumed", "--report", str(tmp_path / "second.jsonl"))
    assert done.returncode == 0, done.stderr
    assert contents(folder / "resumed") == contents(folder / "expected")
    again = records(tmp_path / "second.jsonl")
    assert len([record for record in again if record["status"] == "exists"]) >= len(before)
    for name, time_ns in before.items():
        assert (folder / "resumed" / name).stat().st_mtime_ns == time_ns


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A real S3 server on this machine, which fails when it is told to."""
    server = pytest.importorskip("moto.server")
    s3fs = pytest.importorskip("s3fs")
    running = server.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    running.start()
    host, port = running.get_host_and_port()
    for name, value in {
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
        "AWS_ACCESS_KEY_ID": "x",
        "AWS_SECRET_ACCESS_KEY": "y",
        "AWS_DEFAULT_REGION": "us-east-1",
    }.items():
        monkeypatch.setenv(name, value)
    urllib.request.urlopen(f"http://{host}:{port}/moto-api/reset", data=b"").close()  # its state is the process's
    fs = s3fs.S3FileSystem(skip_instance_cache=True)
    fs.mkdir("photos")
    yield fs
    running.stop()


def test_object_stores_in_and_out(folder: Path, store: Any, tmp_path: Path) -> None:
    for name in ("in", "masks"):
        store.put(f"{folder / name}/", f"photos/{name}", recursive=True)
    store.pipe_file("photos/in/a/broken.jpg", b"no picture")
    store.pipe_file("photos/masks/a/broken.png", b"no picture either")
    report = tmp_path / "report.jsonl"
    places = [str(folder / "model.onnx"), "s3://photos/in", "s3://photos/masks", "-o", "s3://photos/out"]
    done = subprocess.run(
        [*BATCH, *places, "--backend", "onnxruntime", "--report", str(report)],
        capture_output=True,
        text=True,
        timeout=250,
    )
    assert done.returncode == 5, done.stderr
    assert "s3://photos/in/a/broken.jpg: broken.jpg is not a picture" in done.stderr
    found = {path.removeprefix("photos/out/"): store.cat_file(path) for path in store.find("photos/out")}
    assert found == contents(folder / "expected")
    assert len(records(report)) == 201


def test_a_long_listing_is_streamed_page_by_page(store: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """20,000 keys: the first entry is there after one request, and every key comes once."""
    import copy

    from misf.runtime.batch.entries import entries

    store.pipe_file("photos/many/00000.jpg", b"")
    backend = pytest.importorskip("moto.s3.models").s3_backends[
        next(iter(pytest.importorskip("moto.s3.models").s3_backends))
    ]["aws"]
    bucket = backend.buckets["photos"]
    key = bucket.keys["many/00000.jpg"]
    for number in range(1, 20_000):  # put into the server's memory, which takes a second instead of minutes
        other = copy.copy(key)
        other.name = f"many/{number:05d}.jpg"
        bucket.keys[other.name] = other
    requests = 0
    call_s3 = type(store).call_s3

    def counted(self: Any, *arguments: Any, **options: Any) -> Any:
        nonlocal requests
        requests += arguments[0] == "list_objects_v2"
        return call_s3(self, *arguments, **options)

    monkeypatch.setattr(type(store), "call_s3", counted)
    stream = entries("s3://photos/many", "", "s3://photos/out")
    assert next(stream).image == "s3://photos/many/00000.jpg"
    assert requests == 1
    assert len({entry.image for entry in stream}) == 19_999
    assert requests == 20


def test_a_store_that_fails_in_passing_is_asked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    import fsspec

    from misf.runtime.batch import worker

    monkeypatch.setattr(worker.time, "sleep", lambda _seconds: None)
    memory = fsspec.filesystem("memory")
    memory.pipe_file("/x", b"whole")
    failures = iter([OSError("503 Slow Down"), RuntimeError("body cut off"), None])
    read = type(memory).cat_file

    def flaky(self: Any, *arguments: Any, **options: Any) -> bytes:
        if error := next(failures):
            raise error
        return read(self, *arguments, **options)

    monkeypatch.setattr(type(memory), "cat_file", flaky)
    assert worker._read("memory://x") == b"whole"
    failures = iter([OSError("503 Slow Down")] * worker.ATTEMPTS)
    with pytest.raises(OSError, match="503 Slow Down"):
        worker._read("memory://x")


def test_a_node_that_comes_is_used_and_one_that_goes_costs_nothing_but_time(folder: Path, tmp_path: Path) -> None:
    """A list of 1,000 entries, on one node, then two, then one again; misf-small, so that there is time for it."""
    from ray.cluster_utils import Cluster

    relatives = sorted(path.relative_to(folder / "in") for path in (folder / "in/a").glob("*.jpg"))[:20]
    (tmp_path / "in").mkdir()
    for relative in relatives:
        shutil.copy(folder / "in" / relative, tmp_path / "in")
    places = ["misf-small", str(tmp_path / "in"), str(folder / "masks/a"), "-o", str(tmp_path / "expected")]
    subprocess.run([*RUN, *places, "--backend", "onnxruntime", "--threads", "1", "-q"], check=True, timeout=100)
    expected = [(tmp_path / "expected" / relative.name).read_bytes() for relative in relatives]
    with (tmp_path / "list.jsonl").open("w") as lines:
        for number in range(1000):
            relative = relatives[number % 20]
            mask = next((folder / "masks" / relative.parent).glob(f"{relative.stem}*"))
            entry = {
                "image": str(folder / "in" / relative),
                "mask": str(mask),
                "output": str(tmp_path / f"{number}.jpg"),
            }
            lines.write(json.dumps(entry) + "\n")
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    report, said = tmp_path / "report.jsonl", tmp_path / "stderr"

    def until(reached: Callable[[], bool]) -> None:
        deadline = time.monotonic() + 120
        while not reached():
            assert time.monotonic() < deadline, said.read_text()
            assert running.poll() is None, said.read_text()
            time.sleep(0.02)

    try:
        places = ["misf-small", str(tmp_path / "list.jsonl"), "-o", str(tmp_path)]
        more = ["--backend", "onnxruntime", "--address", cluster.address, "--report", str(report)]
        with said.open("w") as stderr:
            running = subprocess.Popen([*BATCH, *places, *more], stdout=subprocess.DEVNULL, stderr=stderr)
        until(lambda: "1 in all" in said.read_text())
        node = cluster.add_node(num_cpus=1)
        until(lambda: "2 in all" in said.read_text())
        done = len(report.read_text().splitlines())
        until(lambda: len(report.read_text().splitlines()) > done + 60)
        cluster.remove_node(node)
        running.wait(timeout=200)
    finally:
        cluster.shutdown()
    assert running.returncode == 0, said.read_text()
    assert "a worker died" in said.read_text()
    assert sorted(record["output"] for record in records(report)) == sorted(
        str(tmp_path / f"{number}.jpg") for number in range(1000)
    )
    for number in range(1000):
        assert (tmp_path / f"{number}.jpg").read_bytes() == expected[number % 20]


@pytest.mark.parametrize(
    ("line", "words"),
    [("{", "line 2: expected a JSON object"), ('{"mask": "x"}', "line 2"), ('{"image": 3}', "line 2")],
)
def test_a_list_with_a_wrong_line_is_named(line: str, words: str, tmp_path: Path) -> None:
    from misf.runtime.batch.entries import entries

    path = tmp_path / "list.jsonl"
    path.write_text('{"image": "x.jpg", "output": "out/y.jpg"}\n' + line + "\n")
    stream = entries(str(path), "", "out")
    assert next(stream).output == "out/y.jpg"
    with pytest.raises(ValueError, match=words):
        next(stream)
