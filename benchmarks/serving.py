"""misf-serve under load: concurrent clients, every response compared with the file that misf-run writes.

    python benchmarks/serving.py                          # 32 clients, batches on and off in turns, then one client
    python benchmarks/serving.py --soak 10                # ten minutes, with the server's memory every second
    python benchmarks/serving.py --url http://host:8080   # a running server; its memory is not measured

Half of the requests go to /inpaint, half to IOPaint's /api/v1/inpaint. A request that gets a 503 is counted, and sent
again after Retry-After; any other failure, or a byte that differs, results in exit code 1. Writes serving.json and
serving.md.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import io
import json
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from PIL import Image

from misf import runtime
from misf.runtime.checks.doctor import machine, versions

SAMPLES = Path(runtime.__file__).parent / "samples"
ROUTES = ("/inpaint", "/api/v1/inpaint")


@dataclass
class Work:
    """A picture, its mask and the expected response."""

    image: bytes
    mask: bytes
    answer: bytes
    size: str


@dataclass
class Load:
    """The results of some clients over some time."""

    name: str
    clients: int
    seconds: float = 0
    milliseconds: list[float] = field(default_factory=list)
    refused: int = 0  # 503, and sent again
    wrong: list[str] = field(default_factory=list)
    megabytes: list[float] = field(default_factory=list)  # of the server, every second
    batch_mean: float = 0

    def row(self) -> dict[str, Any]:
        """Return the results as a row of the table."""
        p50, p99 = np.percentile(self.milliseconds, (50, 99)) if self.milliseconds else (0, 0)
        return {
            "name": self.name,
            "clients": self.clients,
            "seconds": round(self.seconds, 1),
            "answers": len(self.milliseconds),
            "per_second": round(len(self.milliseconds) / self.seconds, 2),
            "p50_ms": round(float(p50), 1),
            "p99_ms": round(float(p99), 1),
            "refused": self.refused,
            "wrong": len(self.wrong),
            "batch_mean": round(self.batch_mean, 2),
            "rss_mb": round(max(self.megabytes, default=0)),
        }


def command(name: str) -> list[str]:
    """Return the command line of a misf command that does not need the script installed by pip."""
    return [sys.executable, "-c", f"from misf.runtime.{name}_cli import main; main()"]


def make_work(folder: Path, sizes: list[int], each: int, model: str, options: list[str]) -> list[Work]:
    """Return pictures cut from the sample photographs, with misf-run's results."""
    rng = np.random.default_rng(0)
    photographs = [Image.open(path).convert("RGB") for path in sorted(SAMPLES.glob("*.jpg"))]
    inputs, masks, outputs = (folder / name for name in ("in", "masks", "out"))
    for place in (inputs, masks):
        place.mkdir()
    for size in sizes:
        for number in range(each):
            photograph = photographs[number % len(photographs)]
            left, top = (int(rng.integers(0, max(1, side - size))) for side in photograph.size)
            picture = photograph.crop((left, top, left + size, top + size))
            hole = np.zeros((size, size), np.uint8)
            for _ in range(3):
                x, y = rng.integers(0, size - size // 5, 2)
                hole[y : y + size // 6, x : x + size // 5] = 255
            suffix = (".jpg", ".png")[number % 2]
            picture.save(inputs / f"{size}-{number}{suffix}", quality=92)
            Image.fromarray(hole).save(masks / f"{size}-{number}.png")
    misf_run = [*command("run"), model, str(inputs), str(masks), "-o", str(outputs), "-q"]
    subprocess.run([*misf_run, *options], check=True, stdout=subprocess.DEVNULL)
    works = []
    for path in sorted(inputs.iterdir()):
        files = path, masks / f"{path.stem}.png", outputs / path.name
        works.append(Work(*(file.read_bytes() for file in files), size=path.stem))
    return works


@contextlib.contextmanager
def server(model: str, options: list[str]) -> Iterator[tuple[str, int]]:
    """Yield the address and the process id of a server, which ends with the block."""
    misf_serve = [*command("serving.serve"), model, "--port=0", "-q", *options]
    process = subprocess.Popen(misf_serve, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        yield process.stdout.readline().strip(), process.pid
    finally:
        process.terminate()
        assert process.wait(120) == 0, "the server did not end well"


def request(client: httpx.Client, address: str, work: Work, route: str) -> httpx.Response:
    if route == ROUTES[0]:
        return client.post(address + route, files={"image": work.image, "mask": work.mask})
    texts = {"image": work.image, "mask": work.mask}
    return client.post(address + route, json={key: base64.b64encode(data).decode() for key, data in texts.items()})


def work_off(address: str, load: Load, works: list[Work], number: int, end: float) -> None:
    """Send requests one after the other until `end`; the last one is finished."""
    rng = np.random.default_rng(number)
    with httpx.Client(timeout=300, trust_env=False) as client:
        while time.monotonic() < end:
            work, route = works[rng.integers(len(works))], ROUTES[rng.integers(2)]
            started = time.monotonic()
            while (answer := request(client, address, work, route)).status_code == 503:
                load.refused += 1
                time.sleep(float(answer.headers["retry-after"]))
            load.milliseconds.append((time.monotonic() - started) * 1000)
            if answer.status_code != 200 or answer.content != work.answer:
                load.wrong.append(f"{route} {work.size}: {answer.status_code} {difference(answer, work)}")


def difference(answer: httpx.Response, work: Work) -> str:
    try:
        ours, right = (np.asarray(Image.open(io.BytesIO(data))).astype(int) for data in (answer.content, work.answer))
        return f"differs by up to {np.abs(ours - right).max()}"
    except Exception:  # no picture
        return answer.text[:200]


def run(name: str, address: str, pid: int | None, works: list[Work], clients: int, seconds: float) -> Load:
    load = Load(name, clients)
    for work in works[:2]:
        with httpx.Client(timeout=300, trust_env=False) as client:
            request(client, address, work, ROUTES[0])
    before = batches(address)
    started = time.monotonic()
    threads = [
        threading.Thread(target=work_off, args=(address, load, works, number, started + seconds))
        for number in range(clients)
    ]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        time.sleep(1)
        if pid is not None:
            load.megabytes.append(resident(pid))
    load.seconds = time.monotonic() - started
    runs, crops = (after - earlier for after, earlier in zip(batches(address), before, strict=True))
    load.batch_mean = crops / runs if runs else 0
    return load


def resident(pid: int) -> float:
    """Return the memory of a process in MB (Linux)."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * 4096 / 1e6


def batches(address: str) -> tuple[float, float]:
    """Return the numbers of model runs and of crops in the server's metrics."""
    lines = httpx.get(f"{address}/metrics", trust_env=False).text.splitlines()
    values = dict(line.rsplit(" ", 1) for line in lines if not line.startswith("#"))
    return float(values["misf_batch_size_count"]), float(values["misf_batch_size_sum"])


def table(rows: list[dict[str, Any]]) -> str:
    """Return the results in Markdown."""
    head = "| server | clients | answers | a second | p50, p99 ms | crops a run | refused | wrong | peak RSS, MB |"
    lines = [head, "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |"]
    for row in rows:
        lines.append(
            f"| {row['name']} | {row['clients']} | {row['answers']} | {row['per_second']:.2f} | "
            f"{row['p50_ms']:.0f}, {row['p99_ms']:.0f} | {row['batch_mean']:.2f} | {row['refused']} | {row['wrong']} | "
            f"{row['rss_mb']} |"
        )
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="misf-small")
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--seconds", type=float, default=60, help="duration of each turn")
    parser.add_argument("--rounds", type=int, default=2, help="number of turns of each server")
    parser.add_argument("--size", type=int, nargs="+", default=[256], help="sides of the pictures")
    parser.add_argument("--pictures", type=int, default=8, help="number of pictures of each size")
    parser.add_argument(
        "--option", action="append", default=[], help="option for both misf-run and misf-serve: --option=-x"
    )
    parser.add_argument("--soak", type=float, metavar="MINUTES", help="test one server for this time")
    parser.add_argument("--url", help="a running server with the same model")
    parser.add_argument("--output", type=Path, default=Path("serving"))
    args = parser.parse_args()
    loads: list[Load] = []
    with tempfile.TemporaryDirectory() as folder:
        works = make_work(Path(folder), args.size, args.pictures, args.model, args.option)
        kinds = {"batches of up to 8": ["--max-batch=8"], "one crop at a time": ["--max-batch=1"]}
        if args.url:
            loads.append(run(args.url, args.url, None, works, args.clients, args.seconds))
        elif args.soak:
            with server(args.model, args.option) as (address, pid):
                loads.append(run("soak", address, pid, works, args.clients, args.soak * 60))
        else:
            for _ in range(args.rounds):
                for name, options in kinds.items():
                    with server(args.model, [*args.option, *options]) as (address, pid):
                        loads.append(run(name, address, pid, works, args.clients, args.seconds))
            with server(args.model, args.option) as (address, pid):
                loads.append(run("one request at a time", address, pid, works, 1, args.seconds))
    text = table([load.row() for load in loads])
    for load in loads:
        minute = load.megabytes[:60], load.megabytes[-60:]
        if args.soak and len(load.megabytes) >= 120:
            first, last = (float(np.mean(part)) for part in minute)
            change = f"{last / first - 1:+.1%}"
            text += f"\n\nMemory in the first minute {first:.0f} MB, in the last {last:.0f} MB ({change})."
        for line in load.wrong[:5]:
            print(line, file=sys.stderr)
    args.output.mkdir(parents=True, exist_ok=True)
    (args.output / "serving.md").write_text(text + "\n")
    document: dict[str, Any] = {"machine": machine(), "versions": versions(), "model": args.model, "sizes": args.size}
    document["loads"] = [load.row() | {"megabytes": [round(value, 1) for value in load.megabytes]} for load in loads]
    (args.output / "serving.json").write_text(json.dumps(document, indent=1) + "\n")
    print(text)
    return 1 if any(load.wrong for load in loads) else 0


if __name__ == "__main__":
    sys.exit(main())
