"""The TensorRT plugin library: where it is, what it was built for, building and loading it.

There is one file per TensorRT major version, `libmisf_trt10.so` and `libmisf_trt11.so`, for programs that load it
through TensorRT's registry (misf, trtexec --dynamicPlugins). Each has a twin `..._selfregister.so` for programs that
only dlopen it (Triton, ONNX Runtime, trtexec --staticPlugins). The sources are here and in kernels/. This module needs
TensorRT and CUDA only for building.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...shared.errors import EnvironmentMismatch, MisfError
from ...shared.files import written_whole

SOURCES = Path(__file__).parent
MAJORS = (10, 11)
BUILD_COMMAND = "misf-plugin build"
_MARKER = b"misf-plugin {"
_MAX_BYTES = 1 << 28

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class LibraryInfo:
    """What a plugin library was built for, read from the file without loading it."""

    path: Path
    misf: str
    """Version of misf."""
    kind: str
    """'loadable' or 'selfregistering'."""
    tensorrt: str
    """Version of the headers it was built with, 'major.minor'."""
    cuda: str
    """Version of the CUDA runtime inside, 'major.minor'."""
    architectures: tuple[str, ...]
    """CUDA architectures, such as '90-real' or '75' (code for that GPU and, without -real, for later ones)."""

    @property
    def tensorrt_major(self) -> int:
        """The TensorRT major version that can load it."""
        return int(self.tensorrt.split(".")[0])


def library_name(tensorrt_major: int, *, self_registering: bool = False) -> str:
    """Return the file name of the library for one TensorRT major version."""
    return f"libmisf_trt{tensorrt_major}{'_selfregister' if self_registering else ''}.so"


def install_folder() -> Path:
    """Return the folder of built libraries: $MISF_HOME/plugins, by default in the user's cache folder."""
    home = os.environ.get("MISF_HOME")
    if home:
        return Path(home).expanduser() / "plugins"
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "misf" / "plugins"


def read_info(path: str | os.PathLike[str]) -> LibraryInfo:
    """Return what the library at `path` was built for.

    Raises:
        OSError: the file cannot be read.
        MisfError: the file is not a plugin library of misf.

    """
    path = Path(path)
    if path.is_file() and path.stat().st_size > _MAX_BYTES:
        raise MisfError(f"{path} is not a misf plugin library: it is larger than {_MAX_BYTES >> 20} MiB")
    data = path.read_bytes()
    start = data.find(_MARKER)
    if not data.startswith(b"\x7fELF") or start < 0:
        raise MisfError(f"{path} is not a misf plugin library; build one: {BUILD_COMMAND}")
    end = data.find(b"\0", start)
    try:
        fields = json.loads(data[start + len(_MARKER) - 1 : end])
        cuda = int(fields["cuda"])
        return LibraryInfo(
            path,
            misf=fields["misf"],
            kind=fields["kind"],
            tensorrt=fields["tensorrt"],
            cuda=f"{cuda // 1000}.{cuda % 1000 // 10}",
            architectures=tuple(fields["architectures"].split()),
        )
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise MisfError(
            f"{path} is a damaged misf plugin library ({error}); build it again: {BUILD_COMMAND}"
        ) from error


def find_library(
    tensorrt_major: int, explicit: str | os.PathLike[str] | None = None, *, self_registering: bool = False
) -> Path:
    """Return the plugin library for one TensorRT major version.

    Args:
        tensorrt_major: 10 or 11.
        explicit: the file that the user named; by default $MISF_PLUGIN, else the library in `install_folder()`, else
            the one beside the sources.
        self_registering: look for the self-registering library.

    Raises:
        EnvironmentMismatch: there is none, or the named one is for another major version or of the other kind.

    """
    named = explicit or (None if self_registering else os.environ.get("MISF_PLUGIN")) or None
    if named:
        path = Path(named)
        if not path.is_file():
            raise EnvironmentMismatch(f"no plugin library at {path}; build one: {BUILD_COMMAND}")
        _check(read_info(path), tensorrt_major, self_registering=self_registering)
        return path
    name = library_name(tensorrt_major, self_registering=self_registering)
    for folder in (install_folder(), SOURCES):
        if (folder / name).is_file():
            _check(read_info(folder / name), tensorrt_major, self_registering=self_registering)
            return folder / name
    raise EnvironmentMismatch(f"no plugin library {name} in {install_folder()}; build it: {BUILD_COMMAND}")


def _check(info: LibraryInfo, tensorrt_major: int, *, self_registering: bool) -> None:
    if info.tensorrt_major != tensorrt_major:
        raise EnvironmentMismatch(
            f"{info.path} is for TensorRT {info.tensorrt_major}, this is TensorRT {tensorrt_major}: "
            f"build one for it with {BUILD_COMMAND}"
        )
    kind = "selfregistering" if self_registering else "loadable"
    if info.kind != kind:
        raise EnvironmentMismatch(f"{info.path} is the {info.kind} library, expected the {kind} one: {BUILD_COMMAND}")


def load_library(registry: Any, path: str | os.PathLike[str], tensorrt_version: str) -> None:
    """Load the plugin library into TensorRT's registry, unless a plugin of this name is already registered.

    Args:
        registry: tensorrt.get_plugin_registry().
        path: from `find_library`.
        tensorrt_version: tensorrt.__version__; a library for another major version is refused, because it would crash
            the process.

    Raises:
        EnvironmentMismatch: the library is for another TensorRT, or TensorRT does not load it.

    """
    if registry.get_creator("DynamicFilter", "1", "misf") is not None:
        return
    info = read_info(path)
    _check(info, int(tensorrt_version.split(".")[0]), self_registering=False)
    if registry.load_library(str(Path(path).resolve())) is None:
        raise EnvironmentMismatch(f"TensorRT {tensorrt_version} does not load {path}; build it again: {BUILD_COMMAND}")


def installed_libraries() -> Iterator[LibraryInfo]:
    """Yield the installed libraries, both kinds, for every TensorRT major version."""
    for major in MAJORS:
        for self_registering in (False, True):
            path = install_folder() / library_name(major, self_registering=self_registering)
            if path.is_file():
                yield read_info(path)


def build(
    *,
    tensorrt_root: str | os.PathLike[str] | None = None,
    fetch_headers: str | None = None,
    architectures: str | None = None,
    jobs: int | None = None,
    extra: tuple[str, ...] = (),
) -> list[LibraryInfo]:
    """Build both libraries with CMake and nvcc, install them and return them.

    Args:
        tensorrt_root: an unpacked TensorRT or a folder with its headers; by default the system's.
        fetch_headers: fetch the headers of this version ('major.minor') from NVIDIA's repository instead.
        architectures: CUDA architectures separated by ';'; by default this machine's GPU or, without one, all.
        jobs: number of parallel compilations.
        extra: further arguments for CMake's configure step.

    Raises:
        EnvironmentMismatch: CMake, nvcc or the headers are missing; the message is CMake's.
        MisfError: the build failed.

    """
    cmake = shutil.which("cmake")
    if cmake is None:
        raise EnvironmentMismatch("cmake was not found: pip install cmake (3.22 or later), or apt install cmake")
    from ...shared.command import misf_version

    with tempfile.TemporaryDirectory(prefix="misf-plugin-") as folder:
        configure = [cmake, "-S", str(SOURCES), "-B", folder, f"-DMISF_VERSION={misf_version()}", *extra]
        if shutil.which("ninja"):
            configure += ["-G", "Ninja"]
        if tensorrt_root is not None:
            configure.append(f"-DTENSORRT_ROOT={Path(tensorrt_root).resolve()}")
        if fetch_headers is not None:
            configure += ["-DMISF_FETCH_TRT_HEADERS=ON", f"-DMISF_TRT_VERSION={fetch_headers}"]
        if architectures is not None:
            configure.append(f"-DCMAKE_CUDA_ARCHITECTURES={architectures}")
        _run(configure, EnvironmentMismatch, "the build of the plugin could not be configured")
        parallel = ["--parallel", *([str(jobs)] if jobs else [])]
        _run([cmake, "--build", folder, *parallel], MisfError, "the plugin did not compile")
        return [_install(path) for path in sorted(Path(folder).glob("libmisf_trt*.so"))]


def _install(built: Path) -> LibraryInfo:
    target = install_folder() / built.name
    target.parent.mkdir(parents=True, exist_ok=True)
    with written_whole(target) as temporary:
        shutil.copyfile(built, temporary)
    return read_info(target)


def _run(command: list[str], error: type[MisfError], what: str) -> None:
    """Run a build step; log its output at debug level, and raise `error` with the reason if it fails."""
    log.debug("%s", " ".join(command))
    result = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    log.debug("%s", result.stdout)
    if result.returncode:
        raise error(f"{what}: {_reason(result.stdout)} (-v shows everything)")


def _reason(output: str) -> str:
    """Return CMake's or the compiler's first error as one line."""
    lines = output.splitlines()
    for number, line in enumerate(lines):
        if line.startswith("CMake Error"):
            message: list[str] = []
            for following in lines[number + 1 :]:
                if following.startswith("Call Stack") or (message and not following.strip()):
                    break
                message.append(following.strip())
            return " ".join(part for part in message if part) or line
        if " error: " in line or line.startswith("nvcc fatal"):
            return line.strip()
    return lines[-1].strip() if lines else "no output"
