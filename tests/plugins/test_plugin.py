"""The TensorRT plugin: building it, running it without TensorRT, and loading it in TensorRT for RTX.

Every run compiles it with g++ against the declarations beside this file, with the kernels for the CPU, and executes it.
With nvcc and NVIDIA's headers, it is also built as users build it.

MISF_TENSORRT_HEADERS: folders with TensorRT headers (or unpacked TensorRTs), separated by colons; ideally several
versions, such as 10.3, 10.13 and 11.1. MISF_RTX_PYTHON: a Python with tensorrt_rtx, if this one does not have it.
"""

from __future__ import annotations

import ctypes
import importlib.util
import json
import os
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from misf.plugins import plugin_cli
from misf.plugins.dynamic_filter import dynamic_filter
from misf.plugins.dynamic_filter.tensorrt import library
from misf.plugins.shared.errors import EnvironmentMismatch, MisfError

from .cuda_host.walker import cuda_headers

HERE = Path(__file__).parent / "plugin_host"
CUDA_HOST = Path(__file__).parent / "cuda_host"
DECLARATIONS = Path(__file__).parent / "tensorrt_declarations"
KERNELS = library.SOURCES.parent / "kernels"
HEADERS = [Path(folder) for folder in os.environ.get("MISF_TENSORRT_HEADERS", "").split(":") if folder]
CXX = os.environ.get("CXX", "g++")


def run(*command: object, **settings: object) -> subprocess.CompletedProcess[str]:
    """Run a command and return its result with the output; fail the test if it fails."""
    result = subprocess.run([str(part) for part in command], capture_output=True, text=True, check=False, **settings)  # type: ignore[call-overload]
    assert result.returncode == 0, f"{command}\n{result.stdout[-3000:]}\n{result.stderr[-3000:]}"
    return result  # type: ignore[no-any-return]


def cuda_home() -> Path:
    """Return the CUDA toolkit, or skip with a reason if there is none."""
    nvcc = shutil.which("nvcc")
    homes = [
        Path(os.environ.get("CUDA_HOME", "/usr/local/cuda")),
        *([Path(nvcc).resolve().parent.parent] if nvcc else []),
    ]
    for home in homes:
        if (home / "bin" / "nvcc").is_file() and (home / "include" / "cuda_runtime_api.h").is_file():
            return home
    pytest.skip("NOT PROVED: the TensorRT plugin was not built, because the CUDA toolkit (nvcc) is not installed")


def include_folder(headers: Path) -> Path:
    return headers if (headers / "NvInferRuntime.h").is_file() else headers / "include"


def version_of(headers: Path) -> tuple[int, int]:
    text = run(CXX, "-E", "-P", "-I", include_folder(headers), "-x", "c++", "-", input=PROBE).stdout
    major, minor = re.findall(r"misf_probe (\d+) (\d+)", text)[0]
    return int(major), int(minor)


PROBE = "#include <NvInferVersion.h>\nmisf_probe NV_TENSORRT_MAJOR NV_TENSORRT_MINOR\n"


class Built:
    """Both libraries for one set of headers, with the harness and a stand-in for libnvinfer."""

    def __init__(self, headers: Path, folder: Path, kernels: list[object]) -> None:
        self.headers, self.folder, self.version = headers, folder, version_of(headers)
        cuda = cuda_headers() if headers == DECLARATIONS else [cuda_home() / "include"]
        self.flags = ["-std=c++17", "-O2", "-fPIC", "-Wall", "-Wextra", "-Werror", f"-I{KERNELS}"]
        for place in (*cuda, include_folder(headers)):
            self.flags += ["-isystem", str(place)]
        common = [self._object("plugin"), self._object("log"), *kernels]
        link = [CXX, "-shared", "-Wl,--no-undefined", "-Wl,--exclude-libs,ALL"]
        major = self.version[0]
        self.loadable = folder / library.library_name(major)
        self.twin = folder / library.library_name(major, self_registering=True)
        run(*link, self._object("exports"), *common, "-o", self.loadable, "-ldl")
        run(*link, self._object("selfregister"), *common, "-o", self.twin, "-ldl")
        self.fake = folder / "fake" / f"libnvinfer.so.{major}"
        self.fake.parent.mkdir()
        soname = f"-Wl,-soname,{self.fake.name}"
        run(CXX, *self.flags, "-shared", soname, HERE / "fake_nvinfer.cpp", "-o", self.fake)
        self.harness = folder / "harness"
        run(CXX, *self.flags, HERE / "harness.cpp", "-o", self.harness, "-ldl")

    def _object(self, name: str) -> Path:
        target = self.folder / f"{name}.o"
        version = '-DMISF_VERSION_TEXT="0.0-test"'
        run(CXX, *self.flags, version, "-fvisibility=hidden", "-c", library.SOURCES / f"{name}.cpp", "-o", target)
        return target


@pytest.fixture(scope="module")
def kernels_for_gpu(tmp_path_factory: pytest.TempPathFactory) -> list[object]:
    """The objects to link for one GPU; the kernels do not depend on TensorRT's headers."""
    home, target = cuda_home(), tmp_path_factory.mktemp("kernels") / "launch.o"
    options = ["-std=c++17", "-O3", f"-arch={gpu_architecture()}", "-Xcompiler", "-fPIC,-fvisibility=hidden"]
    run(home / "bin" / "nvcc", *options, "-c", KERNELS / "launch.cu", "-o", target)
    places = [f"-L{home}/lib64", f"-L{home}/targets/x86_64-linux/lib"]
    return [target, *places, "-lcudart_static", "-lrt", "-lpthread"]


@pytest.fixture(scope="module")
def kernels_for_cpu(tmp_path_factory: pytest.TempPathFactory) -> list[object]:
    """The objects to link for the CPU. Undefined behaviour, such as a misaligned access, ends the process."""
    folder = tmp_path_factory.mktemp("kernels")
    source, launches = re.subn(r"<<<(.*?)>>>", r" << misf_host::On(\1)", (KERNELS / "launch.cu").read_text())
    assert launches == 1
    copy, target = folder / "launch.cu", folder / "launch.o"
    copy.write_text(f'#line 1 "launch.cu"\n{source}')
    options = ["-std=c++17", "-O1", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra", "-Werror"]
    options += ["-Wno-unknown-pragmas", "-fsanitize=undefined", "-fsanitize-undefined-trap-on-error"]
    options += [f"-isystem{place}" for place in cuda_headers()]
    run(CXX, *options, f"-I{KERNELS}", f'-DMISF_LAUNCH="{copy}"', "-c", CUDA_HOST / "launch.cpp", "-o", target)
    return [target]


def gpu_architecture() -> str:
    if not torch.cuda.is_available():
        return "sm_80"
    major, minor = torch.cuda.get_device_capability()
    return f"sm_{major}{minor}"


NVIDIAS = HEADERS or [None]


def name_of(headers: Path | None) -> str:
    return headers.name if headers else "no-headers"


@pytest.fixture(scope="module", params=[DECLARATIONS, *NVIDIAS], ids=name_of)
def built(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Built:
    if request.param is None:
        pytest.skip(
            "NOT PROVED: the TensorRT plugin was not built with NVIDIA's headers: "
            "set MISF_TENSORRT_HEADERS to folders of them"
        )
    if shutil.which(CXX) is None:
        pytest.skip("NOT PROVED: the TensorRT plugin was not built, because there is no C++ compiler")
    kernels = request.getfixturevalue("kernels_for_cpu" if request.param == DECLARATIONS else "kernels_for_gpu")
    return Built(request.param, tmp_path_factory.mktemp("plugin"), kernels)


# ---- our declarations -----------------------------------------------------------------------------------------------


def virtual_tables(headers: Path, program: Path) -> list[str]:
    """Return the positions of the interface's virtual functions, after the compiler has checked everything else."""
    flags = ["-std=c++17", "-Wall", "-Wextra", "-Werror", "-isystem", include_folder(headers)]
    for place in cuda_headers():
        flags += ["-isystem", place]
    run(CXX, *flags, DECLARATIONS / "agreement.cpp", "-o", program)
    return run(program).stdout.splitlines()


@pytest.mark.skipif(platform.machine() != "x86_64", reason="agreement.cpp reads pointers to members as x86-64 has them")
def test_our_declarations_are_nvidias(tmp_path: Path) -> None:
    """Values, layouts, signatures and the order of virtual functions, compared with NVIDIA's headers if available."""
    ours = virtual_tables(DECLARATIONS, tmp_path / "ours")
    assert len(ours) == 32
    for headers in HEADERS:
        theirs = virtual_tables(headers, tmp_path / "theirs")
        # The logger and the registry, which come last, differ in version 10.
        assert theirs == (ours if version_of(headers) >= (11, 0) else ours[:27])
    if not HEADERS:
        pytest.skip("NOT PROVED: our declarations were not compared with NVIDIA's headers: set MISF_TENSORRT_HEADERS")


# ---- the library as a file ------------------------------------------------------------------------------------------


def exported(path: Path) -> set[str]:
    lines = run("readelf", "--dyn-syms", "-W", path).stdout.splitlines()
    symbols = [line.split() for line in lines if re.match(r"\s*\d+:", line)]
    return {row[7] for row in symbols if len(row) > 7 and row[6] != "UND" and row[4] in ("GLOBAL", "WEAK")}


def needed(path: Path) -> set[str]:
    return set(re.findall(r"\(NEEDED\).*\[(.+)\]", run("readelf", "-d", "-W", path).stdout))


def test_what_is_linked_and_exported(built: Built) -> None:
    """The library does not link libnvinfer or libcudart, and exports exactly the two functions that TensorRT looks up.

    The information about the build is in a section of the file rather than in a third function, so that it can be read,
    and a mismatch refused, before any of its code runs.
    """
    system = {"libc.so.6", "libstdc++.so.6", "libgcc_s.so.1", "libm.so.6", "ld-linux-x86-64.so.2"}
    system |= {"ld-linux-aarch64.so.1", "libdl.so.2", "libpthread.so.0", "librt.so.1"}
    assert exported(built.loadable) == {"getCreators", "setLoggerFinder"}
    assert exported(built.twin) == set()
    assert needed(built.loadable) <= system
    assert needed(built.twin) <= system
    info = library.read_info(built.loadable)
    assert info.tensorrt == f"{built.version[0]}.{built.version[1]}"
    assert info.tensorrt_major == built.version[0]


# ---- the plugin, driven as TensorRT does ----------------------------------------------------------------------------


NO_GPU = {**os.environ, "MISF_FAKE_LAUNCH_ERROR": "100"}  # cudaErrorNoDevice, also where kernels run on the CPU


def test_harness_without_tensorrt(built: Built) -> None:
    """Creator, attributes, shapes, formats, serialisation, clones and wrong calls; errors go to stderr."""
    result = run(built.harness, built.loadable, env=NO_GPU)
    assert "FAIL" not in result.stdout
    assert result.stdout.count("ok  ") >= 40
    lines = result.stderr.splitlines()
    assert "misf plugin: DynamicFilter: kernel_size must be odd and from 1 to 101, got 2" in lines
    assert all(line.startswith("misf plugin: DynamicFilter: ") for line in lines)
    failed = [line for line in lines if "launch failed: " in line]
    assert "invalid argument (N,C,H,W = 1073741824,4,1073741824,1073741824)" in failed[0]
    assert failed[1].endswith("(N,C,H,W = 1,4,1,1)")


def test_harness_with_tensorrts_logger(built: Built) -> None:
    """If a TensorRT of the right major version is loaded, errors go to its logger and not to stderr."""
    result = run(built.harness, built.loadable, built.fake, env=NO_GPU)
    assert "FAIL" not in result.stdout
    assert "ok   every refusal is an error in TensorRT's log" in result.stdout
    # The last error of the harness comes without a logger.
    assert len(result.stderr.splitlines()) == 2


REGISTER = """
import ctypes, sys
fake = ctypes.CDLL(sys.argv[1]) if sys.argv[1] != "-" else None   # RTLD_LOCAL, as Python and Triton load TensorRT
ctypes.CDLL(sys.argv[2])
print(fake.misf_fake_registrations() if fake else "none")
"""


def test_the_twin_registers_itself(built: Built) -> None:
    """It registers if TensorRT is already loaded; otherwise, and with another major version, it only logs an error."""

    def load(fake: Path | str, **environment: str) -> tuple[str, str]:
        command = (sys.executable, "-c", REGISTER, fake, built.twin)
        result = run(*command, env={**os.environ, **environment})
        return result.stdout.strip(), result.stderr.strip()

    assert load(built.fake) == ("1", "")
    major = built.version[0]
    message = f"misf plugin: DynamicFilter: not registered: load TensorRT {major} before this library"
    assert load("-") == ("none", message)
    assert load(built.fake, MISF_FAKE_MAJOR=str(21 - major)) == ("0", message)


# ---- enqueue ---------------------------------------------------------------------------------------------------------


def memory_of(tensor: torch.Tensor, name: str) -> bytes:
    """Return N,C,H,W values as bytes in a format; HWC8 pads to a multiple of 8 channels, here with NaN."""
    if name != "hwc8_half":
        return tensor.contiguous().numpy().tobytes()
    n, channels, height, width = tensor.shape
    padded = torch.full((n, height, width, -(-channels // 8) * 8), float("nan"), dtype=tensor.dtype)
    padded[..., :channels] = tensor.permute(0, 2, 3, 1)
    return padded.numpy().tobytes()


FORMATS = ["linear_float", "linear_half", "hwc8_half"]
# N, C, H, W, kernel_size, share
CASES = [
    (1, 4, 1, 1, 3, 4),
    (2, 256, 13, 24, 3, 4),
    (2, 3, 70, 264, 3, 1),
    (1, 20, 9, 10, 3, 4),
    (2, 5, 6, 5, 5, 5),
]


def check_enqueue(command: list[object], name: str, case: tuple[int, ...], folder: Path) -> None:
    """Run `command`, a harness and its library, on random values in a format; compare with the reference in float64."""
    n, channels, height, width, kernel_size, share = case
    dtype = torch.float32 if name == "linear_float" else torch.float16
    generator = torch.Generator().manual_seed(sum(case))
    features = torch.randn(n, channels, height, width, generator=generator).to(dtype)
    taps = torch.randn(n, channels * kernel_size**2 // share, height, width, generator=generator).to(dtype)
    files = [folder / part for part in ("features", "taps", "output")]
    files[0].write_bytes(memory_of(features, name))
    files[1].write_bytes(memory_of(taps, name))
    result = run(*command, name, *case, *files)
    assert "FAIL" not in result.stdout
    values = torch.frombuffer(bytearray(files[2].read_bytes()), dtype=dtype)
    if name == "hwc8_half":
        padded = values.view(n, height, width, -1)
        assert bool((padded[..., channels:] == 0).all())
        values = padded[..., :channels].permute(0, 3, 1, 2)
    expected = dynamic_filter(features.double(), taps.double(), kernel_size, share)
    rtol = 1e-5 if dtype == torch.float32 else 1e-3
    torch.testing.assert_close(values.reshape(features.shape).double(), expected, rtol=rtol, atol=1e-5)


@pytest.mark.parametrize("built", [DECLARATIONS], ids=name_of, indirect=True)
@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("name", FORMATS)
def test_enqueue_on_the_cpu(built: Built, name: str, case: tuple[int, ...], tmp_path: Path) -> None:
    """The creator's plugin through build, clone, plan and context to enqueue, with the shipped kernels."""
    check_enqueue([built.harness, built.loadable], name, case, tmp_path)


@pytest.fixture(scope="module")
def gpu_harness(built: Built) -> Path:
    """The harness, including the part that runs enqueue on a GPU."""
    harness = built.folder / "gpu_harness"
    options = ["-std=c++17", "-DMISF_WITH_GPU", "-x", "cu", "-isystem", include_folder(built.headers)]
    run(cuda_home() / "bin" / "nvcc", *options, HERE / "harness.cpp", "-o", harness, "-ldl")
    return harness


def watched() -> list[str]:
    """Return the command that runs a program under compute-sanitizer if MISF_SANITIZER=1."""
    if os.environ.get("MISF_SANITIZER") != "1":
        return []
    sanitizer = shutil.which("compute-sanitizer")
    if sanitizer is None:
        pytest.skip("NOT PROVED: enqueue was not watched, because compute-sanitizer is not installed")
    return [sanitizer, "--error-exitcode", "9"]


@pytest.mark.gpu
@pytest.mark.parametrize("built", NVIDIAS, ids=name_of, indirect=True)
@pytest.mark.parametrize("name", FORMATS)
def test_enqueue_on_the_gpu(built: Built, gpu_harness: Path, name: str, tmp_path: Path) -> None:
    """Real buffers between guard zones, a CUDA graph, poisoned outputs; MISF_SANITIZER=1: under compute-sanitizer."""
    prefix = watched()
    for case in CASES:
        check_enqueue([*prefix, gpu_harness, built.loadable], name, case, tmp_path)


# ---- TensorRT for RTX: a real parser loads the real library ---------------------------------------------------------

RTX_PROBE = """
import sys
import tensorrt_rtx as trt
logger = trt.Logger(trt.Logger.VERBOSE)
registry = trt.get_plugin_registry()
print("loaded", registry.load_library(sys.argv[1]) is not None, flush=True)
network = trt.Builder(logger).create_network(0)
parser = trt.OnnxParser(network, logger)
print("parsed", parser.parse_from_file(sys.argv[2]), flush=True)
for i in range(parser.num_errors):
    print("parser error", parser.get_error(i).desc(), flush=True)
"""


def rtx_python() -> str:
    named = os.environ.get("MISF_RTX_PYTHON")
    if named:
        return named
    if importlib.util.find_spec("tensorrt_rtx") is not None:
        return sys.executable
    pytest.skip(
        "NOT PROVED: TensorRT's parser did not create the plugin: pip install tensorrt-rtx-cu13, or set MISF_RTX_PYTHON"
    )


def one_node_model(path: Path, kernel_size: int, share: int) -> Path:
    import onnx

    from misf.plugins.dynamic_filter import onnx_op

    onnx_op.register_schema()
    helper = onnx.helper
    attributes = {"kernel_size": kernel_size, "share": share}
    node = helper.make_node("DynamicFilter", ["features", "taps"], ["output"], domain="misf", **attributes)
    sizes = {"features": 8, "taps": 8 * kernel_size**2 // share, "output": 8}
    value = {
        name: helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, ["n", channels, "h", "w"])
        for name, channels in sizes.items()
    }
    graph = helper.make_graph([node], "one", [value["features"], value["taps"]], [value["output"]])
    opsets = [helper.make_opsetid("", onnx_op.OPSET), helper.make_opsetid("misf", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    onnx_op.attach_function(model)
    onnx.save(model, path)
    return path


def test_tensorrt_for_rtx_creates_the_plugin(built: Built, tmp_path: Path) -> None:
    """The node with function body and plugin attributes becomes the plugin, with its attributes.

    TensorRT for RTX cannot use plugins and ends the process after creating one, so the log is the proof.
    """
    python = rtx_python()

    def parse(model: Path) -> str:
        command = [python, "-c", RTX_PROBE, str(built.loadable), str(model)]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        return result.stdout + result.stderr

    log = parse(one_node_model(tmp_path / "right.onnx", 3, 4))
    assert "loaded True" in log
    assert "Successfully created plugin: DynamicFilter" in log
    assert "misf plugin:" not in log
    # The values reach the plugin: a kernel_size that only the plugin refuses is refused by it.
    log = parse(one_node_model(tmp_path / "wrong.onnx", 2, 4))
    assert "kernel_size must be odd and from 1 to 101, got 2" in log
    assert "Successfully created plugin" not in log


# ---- misf-plugin ----------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_build_path_info(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """misf-plugin build with CMake, and everything that finds and describes the libraries."""
    cuda_home()
    if not HEADERS:
        pytest.skip("NOT PROVED: misf-plugin build was not run: set MISF_TENSORRT_HEADERS")
    if shutil.which("cmake") is None:
        pytest.skip("NOT PROVED: misf-plugin build was not run, because cmake is not installed")
    monkeypatch.setenv("MISF_HOME", str(tmp_path))
    for name in ("MISF_PLUGIN", "TRT_ROOT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TENSORRT_ROOT", "/nowhere")  # the flag wins
    runner = CliRunner()
    arguments = ["build", "--tensorrt-root", str(HEADERS[0]), "--architectures", "80-real", "--jobs", "2", "--json"]
    result = runner.invoke(plugin_cli.main, arguments)
    assert result.exit_code == 0, result.output
    documents = json.loads(result.stdout)
    major, minor = version_of(HEADERS[0])
    names = [library.library_name(major), library.library_name(major, self_registering=True)]
    assert [Path(document["path"]).name for document in documents] == names
    assert [document["kind"] for document in documents] == ["loadable", "selfregistering"]
    for document in documents:
        assert document["tensorrt"] == f"{major}.{minor}"
        assert document["architectures"] == ["80-real"]
    loadable, twin = (tmp_path / "plugins" / name for name in names)
    assert exported(loadable) == {"getCreators", "setLoggerFinder"}
    assert exported(twin) == set()

    path = runner.invoke(plugin_cli.main, ["path", "--tensorrt", str(major)])
    assert (path.exit_code, path.stdout.strip()) == (0, str(loadable))
    path = runner.invoke(plugin_cli.main, ["path", "--tensorrt", str(major), "--self-registering"])
    assert path.stdout.strip() == str(twin)
    info = runner.invoke(plugin_cli.main, ["info"])
    assert info.exit_code == 0
    assert [line.split(":")[0] for line in info.stdout.splitlines()] == [str(loadable), str(twin)]

    other = 21 - major
    monkeypatch.setenv("MISF_PLUGIN", str(loadable))
    with pytest.raises(EnvironmentMismatch, match=f"is for TensorRT {major}, this is TensorRT {other}"):
        library.find_library(other)
    with pytest.raises(EnvironmentMismatch, match="is the selfregistering library"):
        library.find_library(major, twin)
    ctypes.CDLL(str(loadable))  # loads without TensorRT and without a GPU


def test_fetching_headers(tmp_path: Path) -> None:
    """CMake fetches include/ of one commit, here from a local repository, and rejects unknown versions."""
    home = cuda_home()
    if shutil.which("cmake") is None or shutil.which("git") is None:
        pytest.skip("NOT PROVED: fetching headers was not run, because cmake or git is not installed")
    source = tmp_path / "TensorRT"
    (source / "include").mkdir(parents=True)
    (source / "include" / "NvInferVersion.h").write_text(
        "#define NV_TENSORRT_MAJOR TRT\n#define TRT 10\n#define NV_TENSORRT_MINOR 99\n"
    )
    (source / "include" / "NvInferRuntime.h").write_text("#include <NvInferVersion.h>\n")
    (source / "big.cpp").write_text("not wanted")
    git = ["git", "-C", source, "-c", "user.name=t", "-c", "user.email=t@example.org"]
    for step in (["init", "-q"], ["add", "."], ["commit", "-qm", "headers"]):
        run(*git, *step)
    run(*git, "config", "uploadpack.allowFilter", "true")
    commit = run(*git, "rev-parse", "HEAD").stdout.strip()

    script = tmp_path / "CMakeLists.txt"
    script.write_text(
        f"cmake_minimum_required(VERSION 3.22)\nproject(p LANGUAGES CXX)\ninclude({library.SOURCES}/headers.cmake)\n"
    )
    options = ["-DMISF_FETCH_TRT_HEADERS=ON", f"-DMISF_TRT_REPOSITORY=file://{source}"]
    environment = {**os.environ, "CUDA_HOME": str(home), "TENSORRT_ROOT": "/nowhere"}
    output = run(
        "cmake", "-S", tmp_path, "-B", tmp_path / "b", f"-DMISF_TRT_COMMIT={commit}", *options, env=environment
    )
    assert "TensorRT 10.99 headers" in output.stdout
    fetched = tmp_path / "b" / "tensorrt-headers"
    assert sorted(path.name for path in fetched.iterdir()) == [".git", "include"]

    command = ["cmake", "-S", str(tmp_path), "-B", str(tmp_path / "c"), "-DMISF_TRT_VERSION=9.3", *options]
    failed = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert failed.returncode != 0
    assert "MISF_TRT_VERSION is '9.3': expected 10.3 to 10.16" in " ".join(failed.stderr.split())


def test_one_line_for_known_failures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MISF_HOME", str(tmp_path))
    monkeypatch.delenv("MISF_PLUGIN", raising=False)
    runner = CliRunner()

    def fails(*arguments: str) -> tuple[int, str]:
        result = runner.invoke(plugin_cli.main, list(arguments))
        lines = [line for line in result.stderr.splitlines() if not line.startswith("building the plugin")]
        assert len(lines) == 1, result.stderr
        return result.exit_code, lines[0]

    assert fails("path", "--tensorrt", "10") == (
        4,
        f"misf-plugin: no plugin library libmisf_trt10.so in {tmp_path / 'plugins'}; build it: misf-plugin build",
    )
    assert fails("info")[0] == 4
    (tmp_path / "text.so").write_text("no library")
    assert fails("info", str(tmp_path / "text.so"))[0] == 1
    assert fails()[0] == 2
    assert fails("build", "--fetch-headers", "9.2")[0] == 2
    assert fails("build", "--fetch-headers", "10.3", "--tensorrt-root", str(tmp_path))[0] == 2
    monkeypatch.setenv("PATH", str(tmp_path))
    code, line = fails("build")
    assert code == 4
    assert "cmake was not found: pip install cmake" in line
    monkeypatch.setenv("MISF_PLUGIN", str(tmp_path / "gone.so"))
    assert fails("path", "--tensorrt", "10")[0] == 4


def test_a_damaged_library(tmp_path: Path) -> None:
    for content in (
        b"",
        b"\x7fELF",
        b"\x7fELF misf-plugin {\0",
        b'\x7fELF misf-plugin {"cuda": "x"}\0',
        b"\x7fELF misf-plugin {}",
    ):
        path = tmp_path / "damaged.so"
        path.write_bytes(content)
        with pytest.raises(MisfError, match="misf-plugin build"):
            library.read_info(path)
    with pytest.raises(FileNotFoundError):
        library.read_info(tmp_path / "missing.so")


class Registry:
    """The part of TensorRT's registry that library.load_library uses."""

    def __init__(self, *, registered: bool = False, loads: bool = True) -> None:
        self.registered, self.loads, self.calls = registered, loads, list[str]()

    def get_creator(self, name: str, version: str, namespace: str) -> object:
        assert (name, version, namespace) == ("DynamicFilter", "1", "misf")
        return object() if self.registered else None

    def load_library(self, path: str) -> object:
        self.calls.append(path)
        return object() if self.loads else None


def test_loading(tmp_path: Path) -> None:
    """It is loaded once, never into a TensorRT of another major version, and a refusal is an error."""
    path = tmp_path / "libmisf_trt10.so"
    fields = {"misf": "0", "kind": "loadable", "tensorrt": "10.3", "cuda": 12060, "architectures": "87-real"}
    path.write_bytes(b"\x7fELF....misf-plugin " + json.dumps(fields).encode() + b"\0more")
    info = library.read_info(path)
    assert (info.cuda, info.architectures, info.tensorrt_major) == ("12.6", ("87-real",), 10)
    registry = Registry()
    library.load_library(registry, path, "10.13.3.9")
    assert registry.calls == [str(path)]
    registry = Registry(registered=True)
    library.load_library(registry, path, "10.13.3.9")
    assert registry.calls == []
    registry = Registry()
    with pytest.raises(EnvironmentMismatch, match="is for TensorRT 10, this is TensorRT 11"):
        library.load_library(registry, path, "11.1.0.2")
    assert registry.calls == []
    with pytest.raises(EnvironmentMismatch, match="does not load"):
        library.load_library(Registry(loads=False), path, "10.3.0")
