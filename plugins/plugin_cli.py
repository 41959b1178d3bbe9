"""misf-plugin: builds the TensorRT plugin library, and prints where it is and what it was built for."""

from __future__ import annotations

import dataclasses
import re

import click

from .shared.command import Command, command, print_json, print_line
from .shared.errors import EnvironmentMismatch


class _Group(Command, click.Group):
    """Subcommands with the exit codes of every misf command, listed in the order in which they are used."""

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002 - click's signature
        """Return the subcommands' names."""
        return list(self.commands)


@click.group("misf-plugin", cls=_Group, invoke_without_command=True)
@click.pass_context
def main(ctx: click.Context) -> None:
    """Build the TensorRT plugin library, or find the installed one.

    \b
    Example: misf-plugin build --tensorrt-root /opt/TensorRT-10.13.3
    """
    if ctx.invoked_subcommand is None:
        raise click.UsageError("expected one of: " + ", ".join(main.list_commands(ctx)))


def _version(_ctx: click.Context, _param: click.Parameter, value: str | None) -> str | None:
    if value is not None and not re.fullmatch(r"1[01]\.\d+", value):
        raise click.BadParameter(f"expected major.minor, 10.3 or later, got {value}")
    return value


@command("build")
@click.option(
    "--tensorrt-root",
    type=click.Path(exists=True, file_okay=False),
    help="An unpacked TensorRT, or a folder with its headers. Default: the system's.",
)
@click.option(
    "--fetch-headers",
    metavar="MAJOR.MINOR",
    callback=_version,
    help="Fetch the headers of this TensorRT version from NVIDIA's repository on GitHub (TensorRT from pip has none).",
)
@click.option("--architectures", metavar="LIST", help="CUDA architectures, as in 80;87. Default: this machine's GPU.")
@click.option("--jobs", type=click.IntRange(min=1), help="Parallel compilations.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
def build_command(
    tensorrt_root: str | None, fetch_headers: str | None, architectures: str | None, jobs: int | None, as_json: bool
) -> None:
    """Build the library with CMake and nvcc, and install it for misf.

    Builds two files for the major version of the TensorRT headers: libmisf_trt10.so, which misf and trtexec
    --dynamicPlugins load, and libmisf_trt10_selfregister.so for Triton, ONNX Runtime and trtexec --staticPlugins.
    Prints their paths.

    \b
    Example: misf-plugin build --fetch-headers 10.13
    """
    from .dynamic_filter.tensorrt import library

    if tensorrt_root and fetch_headers:
        raise click.UsageError("--tensorrt-root and --fetch-headers exclude each other")
    click.echo("building the plugin: seconds for one GPU, a minute or more for all", err=True)
    built = library.build(
        tensorrt_root=tensorrt_root, fetch_headers=fetch_headers, architectures=architectures, jobs=jobs
    )
    if as_json:
        print_json([_document(info) for info in built])
    else:
        print_line("\n".join(str(info.path) for info in built))


@command("path")
@click.option(
    "--tensorrt", "major", type=click.IntRange(10, 11), help="TensorRT major version. Default: the installed one."
)
@click.option("--self-registering", is_flag=True, help="The library for Triton, ONNX Runtime and --staticPlugins.")
def path_command(major: int | None, self_registering: bool) -> None:
    """Print the library's path, for trtexec and Triton.

    \b
    Example: trtexec --onnx=model.onnx --stronglyTyped --dynamicPlugins=$(misf-plugin path)
    """
    from .dynamic_filter.tensorrt import library

    print_line(str(library.find_library(major or _installed_major(), self_registering=self_registering)))


@command("info")
@click.argument("libraries", nargs=-1, type=click.Path(exists=True, dir_okay=False))
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
def info_command(libraries: tuple[str, ...], as_json: bool) -> None:
    """Print what LIBRARIES, by default the installed ones, were built for, without loading them.

    \b
    Example: misf-plugin info --json
    """
    from .dynamic_filter.tensorrt import library

    infos = [library.read_info(path) for path in libraries] if libraries else list(library.installed_libraries())
    if as_json:
        print_json([_document(info) for info in infos])
        return
    if not infos:
        raise EnvironmentMismatch(f"no plugin library in {library.install_folder()}; build one: misf-plugin build")
    for info in infos:
        click.echo(
            f"{info.path}: {info.kind}, TensorRT {info.tensorrt}, CUDA {info.cuda}, "
            f"architectures {' '.join(info.architectures)}, misf {info.misf}"
        )


def _installed_major() -> int:
    """Return the major version of the installed TensorRT, without importing it."""
    from importlib.metadata import PackageNotFoundError, version

    for package in ("tensorrt", "tensorrt-cu12", "tensorrt-cu13"):
        try:
            return int(version(package).split(".")[0])
        except PackageNotFoundError:
            continue
    raise EnvironmentMismatch("TensorRT is not installed in this Python: give its major version, as in --tensorrt 10")


def _document(info: object) -> dict[str, object]:
    fields = dataclasses.asdict(info)  # type: ignore[call-overload]
    return {key: list(value) if isinstance(value, tuple) else str(value) for key, value in fields.items()}


for subcommand in (build_command, path_command, info_command):
    main.add_command(subcommand)
