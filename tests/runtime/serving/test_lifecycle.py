"""misf-serve as a process: started wrongly, stopped under load, killed and started again, with several workers."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import socket
import subprocess
import threading
import time
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from misf.runtime.serving import observing
from misf.runtime.serving.app import create_app, say_ready
from misf.runtime.serving.settings import ServerSettings
from tests.support.serving import MISF_SERVE, gated, png, spawned, until
from tests.support.tiny_models import mean_fill

pytestmark = pytest.mark.timeout(180)
SIZE = (64, 64)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return mean_fill(tmp_path_factory.mktemp("model") / "mean.onnx")


@pytest.fixture(scope="module")
def files() -> dict[str, bytes]:
    hole = np.zeros(SIZE, np.uint8)
    hole[8:20, 8:20] = 255
    return {"image": png(np.full((*SIZE, 3), 77, np.uint8)), "mask": png(hole)}


class Client(threading.Thread):
    """Sends one request after the other; what became of each is kept."""

    def __init__(self, address: str, files: dict[str, bytes], retry: bool = False) -> None:
        super().__init__()
        self._address, self._files, self._retry = address, files, retry
        self.statuses: list[int] = []
        self.cut: list[str] = []  # accepted and not answered
        self.refused = 0
        self.stop = False

    def run(self) -> None:
        while not self.stop:
            try:
                answer = httpx.post(f"{self._address}/inpaint", files=self._files, timeout=30, trust_env=False)
                assert answer.status_code != 200 or answer.headers["content-type"] == "image/png"
                self.statuses.append(answer.status_code)
            except (httpx.ConnectError, httpx.ConnectTimeout):
                self.refused += 1
                if not self._retry:
                    return
                time.sleep(0.05)
            except httpx.TransportError as error:
                self.cut.append(repr(error))
                if not self._retry:
                    return


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*MISF_SERVE, *arguments], capture_output=True, text=True, timeout=60, env=os.environ | environment
    )


def test_sigterm_under_load_answers_what_was_taken(model: Path, files: dict[str, bytes]) -> None:
    with spawned(model) as (process, address):
        clients = [Client(address, files) for _ in range(8)]
        for client in clients:
            client.start()
        until(lambda: sum(len(client.statuses) for client in clients) > 20)
        process.send_signal(signal.SIGTERM)
        asked = time.monotonic()
        assert process.wait(60) == 0
        assert time.monotonic() - asked < 60
        for client in clients:
            client.join(60)
        assert process.stderr is not None
        taken = [line for line in process.stderr.read().splitlines() if " POST /inpaint " in line]
    # A connection whose request had not been read is closed: the client retries, as after a refusal.
    answered = [status for client in clients for status in client.statuses]
    assert set(answered) == {200}
    assert len(taken) == len(answered)
    assert sum(client.refused + len(client.cut) for client in clients) == len(clients)


def test_sigterm_answers_a_request_that_is_in_the_model(model: Path) -> None:
    hole = np.full((1500, 1500), 255, np.uint8)
    hole[:8] = 0
    large = {"image": png(np.zeros((1500, 1500, 3), np.uint8)), "mask": png(hole)}
    with spawned(model) as (process, address):
        answers: list[int] = []
        thread = threading.Thread(
            target=lambda: answers.append(
                httpx.post(f"{address}/inpaint", files=large, timeout=60, trust_env=False).status_code
            )
        )
        thread.start()
        until(lambda: "misf_requests_in_work 1.0" in httpx.get(f"{address}/metrics", trust_env=False).text)
        process.send_signal(signal.SIGTERM)
        thread.join(60)
        assert process.wait(60) == 0
    assert answers == [200]


def test_killed_and_started_again_clients_only_have_to_retry(
    model: Path, files: dict[str, bytes], tmp_path: Path
) -> None:
    temporary = tmp_path / "tmp"
    temporary.mkdir()
    with spawned(model, TMPDIR=str(temporary)) as (process, address):
        clients = [Client(address, files, retry=True) for _ in range(4)]
        for client in clients:
            client.start()
        until(lambda: all(client.statuses for client in clients))
        process.kill()
        process.wait(30)
        before = [len(client.statuses) for client in clients]
        port = address.rpartition(":")[2]
        with spawned(model, f"--port={port}", TMPDIR=str(temporary)) as (_again, same_address):
            assert same_address == address
            until(lambda: all(len(client.statuses) > count + 3 for client, count in zip(clients, before, strict=True)))
            for client in clients:
                client.stop = True
            for client in clients:
                client.join(60)
    assert {status for client in clients for status in client.statuses} == {200}
    assert not list(temporary.iterdir())


def test_one_worker_prints_the_address_when_its_model_is_warm(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / observing.ADDRESS_NOTE).write_text("http://here", encoding="utf-8")
    inpainter, gate = gated(model)
    printed = []

    def on_ready() -> None:
        printed.append((capsys.readouterr().out, len(gate.shapes)))
        with monkeypatch.context() as patched:
            patched.setenv(observing.WORKERS_FOLDER, str(tmp_path))
            say_ready()
            say_ready()
        printed.append((capsys.readouterr().out, len(gate.shapes)))

    messages = iter([{"type": "lifespan.startup"}, {"type": "lifespan.shutdown"}])

    async def receive() -> Any:
        return next(messages)

    async def send(_message: Any) -> None:
        pass

    asyncio.run(create_app(ServerSettings(str(model)), inpainter, on_ready)({"type": "lifespan"}, receive, send))
    assert printed == [("", 1), ("http://here\n", 1)]


def test_what_a_dead_worker_had_in_work_is_forgotten_and_what_it_counted_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(observing.WORKERS_FOLDER, str(tmp_path))
    dead = subprocess.Popen(["true"])
    dead.wait(60)
    names = {f"gauge_livesum_{os.getpid()}.db", f"counter_{dead.pid}.db"}
    for name in (*names, f"gauge_livesum_{dead.pid}.db"):
        (tmp_path / name).touch()
    observing.forget_dead_workers()
    assert {file.name for file in tmp_path.iterdir()} == names


def test_workers_share_a_port_and_their_metrics(model: Path, files: dict[str, bytes]) -> None:
    with spawned(model, "--workers=2") as (process, address), httpx.Client(trust_env=False, timeout=60) as client:
        for _ in range(6):
            assert client.post(f"{address}/inpaint", files=files).status_code == 200
        lines = client.get(f"{address}/metrics").text.splitlines()
        [value] = [line.split()[-1] for line in lines if line.startswith('misf_requests_total{route="/inpaint"')]
        assert float(value) == 6
        children = [int(pid) for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0
    assert len(children) >= 2
    until(lambda: not [pid for pid in children if Path(f"/proc/{pid}").exists()])


def test_logs_are_json_without_secrets_and_name_the_request(
    model: Path, files: dict[str, bytes], tmp_path: Path
) -> None:
    secret = "a-token-of-some-length"
    (tmp_path / "token").write_text(f"{secret}\n")
    bearer = {"Authorization": f"Bearer {secret}"}
    with spawned(model, "--json-logs", f"--token-file={tmp_path / 'token'}") as (process, address):
        black = files | {"mask": png(np.zeros(SIZE, np.uint8))}
        answer = httpx.post(f"{address}/inpaint?grow=3", files=black, headers=bearer, trust_env=False)
        assert answer.status_code == 200
        assert httpx.get(f"{address}/api/v1/model?key={secret}", trust_env=False).status_code == 401
        host, port = address.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port)), 30) as scanner:
            scanner.sendall(b"\x16\x03\x01 no HTTP\r\n\r\n")
            assert scanner.recv(100).startswith(b"HTTP/1.1 400 ")
        process.send_signal(signal.SIGTERM)
        _, log = process.communicate(timeout=60)
    assert secret not in log
    lines = [json.loads(line) for line in log.splitlines()]
    [access] = [line for line in lines if line.get("route") == "/inpaint"]
    assert (access["method"], access["status"], access["level"]) == ("POST", 200, "info")
    [warning] = [line for line in lines if "the mask is empty" in line["message"]]
    assert warning["request_id"] == access["request_id"] == answer.headers["x-request-id"]


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["no-such-model"], 2, "no-such-model"),
        (["{model}", "--host=203.0.113.7"], 1, "cannot listen on 203.0.113.7:0"),
        (["{model}", "--port=99999"], 2, "99999"),
        (["{model}", "--timeout=inf"], 2, "--timeout"),
        (["{model}", "--device=cuda:7"], 4, "cuda:7 was requested"),
        (["{empty}"], 1, "is empty"),
        (["{model}", "--token-file={empty}"], 2, "expected at least 16"),
    ],
)
def test_what_is_wrong_at_the_start_is_one_line(
    model: Path, tmp_path: Path, arguments: list[str], code: int, words: str
) -> None:
    empty = tmp_path / "empty.onnx"
    empty.touch()
    done = run(
        *[text.format(model=model, empty=empty) for text in arguments],
        *(["--port=0"] if "99999" not in arguments[-1] else []),
    )
    assert done.returncode == code, done.stderr
    assert words in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr
    assert done.stdout == ""


def test_a_port_that_is_taken_is_one_line(model: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        done = run(str(model), f"--port={other.getsockname()[1]}")
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].endswith("Address already in use")


def test_a_worker_that_dies_is_replaced_and_none_outlives_its_parent(
    model: Path, files: dict[str, bytes], tmp_path: Path
) -> None:
    temporary = tmp_path / "tmp"
    temporary.mkdir()
    with spawned(model, "--workers=2", TMPDIR=str(temporary)) as (process, address):

        def workers() -> list[int]:
            found = []
            for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split():
                with contextlib.suppress(OSError):  # it has ended since
                    if b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes():
                        found.append(int(pid))
            return found

        def answered() -> Any:
            try:
                return httpx.post(f"{address}/inpaint", files=files, timeout=30, trust_env=False).status_code == 200
            except httpx.TransportError:
                return False

        def started() -> list[int]:
            """Return the workers that have begun to count: uvicorn takes minutes to miss one that is still starting."""
            names = [path.name for path in temporary.glob("misf-metrics-*/*.db")]
            return [pid for pid in workers() if any(name.endswith(f"_{pid}.db") for name in names)]

        until(lambda: len(started()) == 2)
        until(answered)
        first = workers()
        os.kill(first[0], signal.SIGKILL)
        until(lambda: len(started()) == 2 and first[0] not in workers())
        until(answered)
        before = workers()
        assert list(temporary.glob("misf-metrics-*"))
        process.kill()
        process.wait(30)
        until(lambda: not [pid for pid in before if Path(f"/proc/{pid}").exists()])
    assert not list(temporary.glob("misf-*"))
