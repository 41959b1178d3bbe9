"""The Dockerfile, built by buildah on a Debian that debootstrap makes, and the image run with a read-only root."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
from pathlib import Path
from typing import Any

import httpx
import pytest

from misf import runtime
from tests.support.serving import opened, until

ROOT = Path(__file__).parents[3]
DEPLOY = "runtime/serving/deploy"
VARIABLE = "MISF_TEST_CONTAINER"
MIRROR = "http://deb.debian.org/debian"

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500)]


@pytest.fixture
def buildah(tmp_path: Path) -> Any:
    """Return a function that runs buildah with a store of its own and returns what it prints."""
    if VARIABLE not in os.environ:
        pytest.skip(f"takes five minutes and downloads Debian: set {VARIABLE}=1")
    if os.geteuid() or not (shutil.which("buildah") and shutil.which("debootstrap")):
        pytest.skip("needs root, buildah and debootstrap")
    store = ["--storage-driver=vfs", f"--root={tmp_path / 'store'}", f"--runroot={tmp_path / 'run'}"]

    def run(*arguments: str) -> str:
        done = subprocess.run(["buildah", *store, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=900)
        assert done.returncode == 0, done.stderr[-3000:]
        return done.stdout.strip()

    return run


def debian(folder: Path) -> None:
    """Make a small Debian with Python, and with this machine's way to packages of Python."""
    packages = "--include=python3,python3-venv,ca-certificates"
    command = ["debootstrap", "--variant=minbase", packages, "bookworm", str(folder), MIRROR]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, timeout=600)
    for name in ("etc/pip.conf", "etc/xdg/pip/constraints.txt", "etc/ssl/certs/ca-certificates.crt"):
        if (Path("/") / name).exists():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(Path("/") / name, folder / name)


def test_the_image_serves_as_nobody_on_a_read_only_root(buildah: Any, tmp_path: Path) -> None:
    debian(tmp_path / "base")
    scratch = buildah("from", "scratch")
    buildah("copy", scratch, str(tmp_path / "base"), "/")
    buildah("commit", "-q", scratch, "localhost/base")
    build = ["bud", "--isolation=chroot", "--network=host", "--format=docker", "--build-arg=BASE=localhost/base"]
    files = [f"--file={DEPLOY}/Dockerfile", f"--ignorefile={DEPLOY}/Dockerfile.dockerignore"]
    buildah(*build, *files, "-t", "localhost/misf", ".")
    container = buildah("from", "localhost/misf")
    root = buildah("mount", container)
    config = "{{.Docker.Config.User}} {{.Docker.Config.Entrypoint}} {{.Docker.Config.Cmd}}"
    assert (
        buildah("inspect", "--format", config, container)
        == "10001:10001 [misf-serve --host=0.0.0.0 --json-logs] [misf-small]"
    )
    place = tmp_path / "root"
    place.mkdir()
    program = f"""
        mount --bind {root} {place}; mount -o remount,ro,bind {place}
        mount -t proc proc {place}/proc; mount -t tmpfs tmp {place}/tmp
        if touch {place}/x 2>/dev/null; then exit 9; fi
        exec chroot --userspec=10001:10001 {place} /usr/bin/env -i PATH=/opt/misf/bin:/usr/bin \\
            PYTHONDONTWRITEBYTECODE=1 misf-serve --port=0 --json-logs misf-small"""
    process = subprocess.Popen(["unshare", "-m", "bash", "-ec", program], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        address = process.stdout.readline().strip()
        with httpx.Client(base_url=address, trust_env=False, timeout=60) as client:
            until(lambda: client.get("/healthz").status_code == 200)
            assert client.get("/").headers["content-type"].startswith("text/html")
            samples = Path(runtime.__file__).parent / "samples"
            files_ = {"image": samples / "astronaut.jpg", "mask": samples / "masks" / "astronaut.png"}
            answer = client.post("/inpaint", files={name: path.read_bytes() for name, path in files_.items()})
            assert opened(answer.content).format == "JPEG"
        assert "Uid:\t10001" in Path(f"/proc/{process.pid}/status").read_text()
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0
    finally:
        process.kill()
        process.communicate()
        buildah("rm", "-a")
