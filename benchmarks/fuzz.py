"""Runs misf-run on mutated pictures, masks, checkpoints and ONNX files: no tracebacks, crashes or leftover files.

python benchmarks/fuzz.py [--cases 250] [--seed 0] [--minutes 20] [--kinds picture mask checkpoint onnx]

`--cases` is the number of cases of each kind. It prints a JSON document with the results, and exits with 1 if there are
problems. A case is reproducible from its kind, seed and number, and is kept with `--keep FOLDER`. The cases run in a
separate process, so that a crash or hang of it is found too.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import selectors
import struct
import subprocess
import sys
import tempfile
import time
import zlib
from collections import Counter
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

KINDS = ("picture", "mask", "checkpoint", "onnx")
SIDE = 64
SECONDS = 60  # a case that takes longer counts as hanging
GIGABYTES = 3.0  # more than Pillow's limit of 179 megapixels needs as RGBA, decoded and copied
EXTREMES = (0, 1, 0x7F, 0xFF, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0xFFFFFFFF)


def pictures() -> dict[str, bytes]:
    """Return small files of every kind that misf-run reads, by name."""
    y, x = np.mgrid[:SIDE, :SIDE]
    image = Image.fromarray(np.stack([x * 4, y * 4, (x * y) % 256], -1).astype(np.uint8))
    exif = Image.Exif()
    exif.update({0x0112: 6, 0x010E: "a picture", 0x8298: "somebody"})
    said: dict[str, Any] = {"exif": exif.tobytes(), "dpi": (300, 300), "icc_profile": bytes(range(256))}
    modes = {mode: image.convert(mode) for mode in ("1", "L", "P", "RGB", "RGBA", "LA", "CMYK")}
    grey16 = Image.fromarray((x * 1000 + y).astype(np.uint16))
    wanted: list[tuple[str, Image.Image, dict[str, Any]]] = [
        *((f"{mode}.png", modes[mode], said) for mode in ("1", "L", "P", "RGB", "RGBA", "LA")),
        ("key.png", modes["RGB"], {"transparency": (0, 0, 0)}),
        ("16.png", grey16, {}),
        ("RGB.jpg", modes["RGB"], said),
        ("progressive.jpg", modes["RGB"], {"progressive": True, "comment": b"a comment"}),
        ("CMYK.jpg", modes["CMYK"], {}),
        ("lossy.webp", modes["RGBA"], said),
        ("lossless.webp", modes["RGB"], {"lossless": True}),
        *((f"{name}.tif", modes["RGB"], {"compression": name, **said}) for name in ("raw", "tiff_lzw", "jpeg")),
        ("group4.tif", modes["1"], {"compression": "group4"}),
        ("deflate.tif", modes["RGBA"], {"compression": "tiff_adobe_deflate"}),
        ("16.tif", grey16, {}),
        ("RGB.bmp", modes["RGB"], {}),
        ("P.bmp", modes["P"], {}),
        ("P.gif", modes["P"], {}),
        ("RGB.avif", modes["RGB"], said),
    ]
    found = {}
    for name, one, options in wanted:
        buffer = io.BytesIO()
        one.save(buffer, {"jpg": "JPEG", "tif": "TIFF"}.get(name.split(".")[1], name.split(".")[1].upper()), **options)
        found[name] = buffer.getvalue()
    return found


def models(kind: str) -> dict[str, bytes]:
    """Return checkpoints of the smallest network, or an ONNX file, by name."""
    if kind == "onnx":
        return {"small.onnx": (files("misf.runtime") / "models" / "misf-small.onnx").read_bytes()}
    from misf.training import PRESETS
    from misf.training.model.checkpoint import save_checkpoint
    from misf.training.model.network import InpaintingNetwork

    network = InpaintingNetwork(PRESETS["misf-tiny"])
    with tempfile.TemporaryDirectory() as folder:
        paths = [Path(folder) / name for name in ("tiny.safetensors", "tiny.pt")]
        for path in paths:
            save_checkpoint(path, network.config, network.state_dict())
        return {path.name: path.read_bytes() for path in paths}


def mutated(data: bytes, rng: np.random.Generator) -> bytes:
    """Return `data` with some damage: bytes and numbers changed, parts cut, repeated, zeroed or moved."""
    changed = bytearray(data)
    mild = rng.random() < 0.4  # bytes anywhere, same length, so that damage is found late or never
    for _ in range(int(rng.integers(1, 5))):
        end = len(changed) if mild or rng.random() < 0.4 else min(len(changed), 512)  # most structure is at the start
        at = int(rng.integers(0, max(1, end)))
        length = int(rng.integers(1, 64))
        part = changed[at : at + length]
        match int(rng.integers(0, 4 if mild else 7)):
            case 0:
                changed[at : at + 1] = rng.bytes(1)
            case 1:
                width = int(rng.choice([1, 2, 4]))
                value = int(rng.choice(EXTREMES)) & (256**width - 1)
                changed[at : at + width] = value.to_bytes(width, "big" if rng.random() < 0.5 else "little")
            case 2:
                changed[at : at + length] = bytes(len(part))
            case 3:
                changed[at : at + length] = rng.bytes(len(part))
            case 4:
                del changed[at : at + length]
            case 5:
                changed[at:at] = part
            case 6 if rng.random() < 0.3:
                del changed[max(at, 1) :]
    return with_checksums(bytes(changed)) if rng.random() < 0.7 else bytes(changed)


def with_checksums(data: bytes) -> bytes:
    """Return a PNG with corrected checksums of its chunks, so that they do not reveal the damage."""
    if not data.startswith(b"\x89PNG\r\n\x1a\n"):
        return data
    changed, at = bytearray(data), 8
    while at + 12 <= len(data):
        [length] = struct.unpack_from(">I", data, at)
        if at + 12 + length > len(data):
            break
        struct.pack_into(">I", changed, at + 8 + length, zlib.crc32(data[at + 4 : at + 8 + length]))
        at += 12 + length
    return bytes(changed)


def case(kind: str, seed: int, number: int, sources: dict[str, bytes]) -> tuple[str, bytes]:
    """Return the name and the bytes of a case."""
    rng = np.random.default_rng([seed, KINDS.index(kind), number])
    name = sorted(sources)[int(rng.integers(len(sources)))]
    return name, mutated(sources[name], rng)


def problems_of(kind: str, name: str, data: bytes, folder: Path) -> tuple[int, list[str]]:
    """Run misf-run on a case in an empty folder; return its exit code and the problems found."""
    from click.testing import CliRunner

    from misf.runtime.run_cli import main

    good = pictures()
    suffix = Path(name).suffix
    places = {kind: folder / f"damaged{suffix}"}
    places[kind].write_bytes(data)
    for other, whole in (("picture", good["RGB.png"]), ("mask", good["1.png"])):
        if other != kind:
            places[other] = folder / f"{other}.png"
            places[other].write_bytes(whole)
    model = places.get("checkpoint") or places.get("onnx") or "misf-small"
    output = folder / f"out{suffix if kind == 'picture' else '.png'}"
    before = {path.name for path in folder.iterdir()}
    backend = "pytorch" if kind == "checkpoint" else "onnxruntime"
    arguments = [model, places["picture"], places["mask"], "-o", output, "--backend", backend, "--threads", 1]
    result = CliRunner().invoke(main, [str(one) for one in arguments])
    left = {path.name for path in folder.iterdir()} - before
    wrong = []
    lines = [line for line in result.stderr.splitlines() if not line.startswith("warning: ")]
    if "Traceback" in result.output or not isinstance(result.exception, SystemExit | None):
        wrong.append(f"traceback: {result.exception!r}")
    if result.exit_code not in (0, 1, 4):
        wrong.append(f"exit code {result.exit_code}: {result.stderr[-300:]}")
    if result.exit_code == 0:
        wrong += [] if left == {output.name} else [f"files: {sorted(left)}"]
        if not wrong:
            with Image.open(output) as image:
                image.load()
    elif left:
        wrong.append(f"files left: {sorted(left)}")
    elif not lines or not lines[-1].startswith("misf-run: ") or len(lines[-1]) > 1000:
        wrong.append(f"not one line: {result.stderr[-500:]!r}")
    elif not any(text in lines[-1] for text in (places[kind].name, "the model", "the mask is")):
        wrong.append(f"the line does not name the file: {lines[-1]}")
    return result.exit_code, wrong


def peak_gigabytes() -> float:
    """Return the largest memory of this process so far; ru_maxrss would be that of the process which started it."""
    [line] = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM:")]
    return int(line.split()[1]) / 2**20


def work(kind: str, seed: int, first: int, last: int, keep: str) -> None:
    """Run cases in a worker, and print a line of JSON for each."""
    sources = pictures() if kind in ("picture", "mask") else models(kind)
    print("ready", flush=True)
    for number in range(first, last):
        name, data = case(kind, seed, number, sources)
        with tempfile.TemporaryDirectory() as folder:
            try:
                code, wrong = problems_of(kind, name, data, Path(folder))
            except Exception as error:
                code, wrong = -1, [f"{type(error).__name__}: {error}"]
        peak = peak_gigabytes()
        if peak > GIGABYTES:
            wrong.append(f"memory: {peak:.1f} GB")
        if keep and wrong:
            Path(keep, f"{kind}-{number}-{name}").write_bytes(data)
        record = {"number": number, "name": name, "code": code, "wrong": wrong, "peak_gb": round(peak, 2)}
        print(json.dumps(record), flush=True)
        if peak > GIGABYTES:
            return  # the measured peak of later cases would be that of this one


def fuzz(kind: str, seed: int, cases: int, deadline: float, keep: str = "") -> dict[str, Any]:
    """Return the results of the cases of a kind: number, exit codes, peak memory and problems."""
    codes: Counter[str] = Counter()
    wrong: list[dict[str, Any]] = []
    number, peak = 0, 0.0
    while number < cases and time.monotonic() < deadline:
        for line in _lines([kind, str(seed), str(number), str(cases), keep], deadline):
            if not line.startswith("{"):
                record = {"number": number, "code": line, "wrong": [line], "peak_gb": 0.0}
            else:
                record = json.loads(line)
            codes[str(record["code"])] += 1
            peak = max(peak, record["peak_gb"])
            wrong += [{"kind": kind, **record}] if record["wrong"] else []
            number += 1
    return {"cases": number, "exit_codes": dict(codes), "peak_gb": peak, "wrong": wrong}


def _lines(arguments: list[str], deadline: float) -> Any:
    """Yield the lines of a worker, and one about its end if it crashes or hangs."""
    environment = {**os.environ, "MISF_LOG_LEVEL": "WARNING"}
    command = [sys.executable, __file__, "--worker", *arguments]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environment
    ) as run:
        assert run.stdout is not None
        selector = selectors.DefaultSelector()
        selector.register(run.stdout, selectors.EVENT_READ)
        ready = False
        while selector.select(SECONDS):
            line = run.stdout.readline().strip()
            if not line:
                break
            if ready:
                yield line
            ready = True
            if time.monotonic() > deadline:
                run.kill()
                return
        else:
            run.kill()
            yield f"hangs: nothing for {SECONDS} s"
            return
        if run.wait() != 0:
            yield f"the process ended with {run.returncode}"


def main(arguments: list[str]) -> int:
    """Return the exit code."""
    if arguments[:1] == ["--worker"]:
        work(arguments[1], *map(int, arguments[2:5]), arguments[5])
        return 0
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--cases", type=int, default=250)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--minutes", type=float, default=20)
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS)
    parser.add_argument("--keep", default="")
    chosen = parser.parse_args(arguments)
    deadline = time.monotonic() + 60 * chosen.minutes
    found = {kind: fuzz(kind, chosen.seed, chosen.cases, deadline, chosen.keep) for kind in chosen.kinds}
    print(json.dumps(found, indent=2))
    return 1 if any(one["wrong"] for one in found.values()) else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
