"""Reading and writing checkpoints: ours (safetensors or .pt) and the official MISF generator files."""

from __future__ import annotations

import json
import os
import pickle
import re
import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ...plugins.shared.errors import MisfError
from ...plugins.shared.files import sha256, written_whole
from .config import NetworkConfig

if TYPE_CHECKING:
    from .network import InpaintingNetwork

FORMAT = "misf-1"


@dataclass(frozen=True)
class Checkpoint:
    """What a checkpoint file holds: the config, the weights (float32, on the CPU) and where they came from."""

    config: NetworkConfig
    weights: dict[str, Tensor]
    iteration: int
    sha256: str
    path: Path


def load_model(path: str | os.PathLike[str], *, official: bool = False) -> InpaintingNetwork:
    """Return the network of a checkpoint in eval mode, on the CPU, in float32: (image, mask) -> prediction.

    Args:
        path: .safetensors, .pt or .pth.
        official: the file is a generator checkpoint of the official MISF repository.

    Raises:
        MisfError: the file is not such a checkpoint; the message says what it is instead.
        OSError: it cannot be read.

    """
    return build_model(load_checkpoint(path, official=official))


def build_model(checkpoint: Checkpoint) -> InpaintingNetwork:
    """Return the network of a loaded checkpoint in eval mode."""
    from .network import InpaintingNetwork

    with torch.device("meta"):
        network = InpaintingNetwork(checkpoint.config)
    network.load_state_dict(checkpoint.weights, assign=True)
    return network.eval().requires_grad_(False)


def load_checkpoint(path: str | os.PathLike[str], *, official: bool = False) -> Checkpoint:
    """Return the contents of a checkpoint file, every name and shape checked; errors as `load_model`."""
    path = Path(path)
    if path.is_dir():
        raise MisfError(f"{path} is a folder, expected a checkpoint file (.safetensors, .pt or .pth)")
    digest = sha256(path)
    if path.stat().st_size == 0:
        raise MisfError(f"{path} is empty, expected a checkpoint: was its download or copy interrupted?")
    if _is_safetensors(path):
        config, weights, iteration = _read_safetensors(path, official)
    else:
        config, weights, iteration = _interpret(path, _read_pickle(path), official)
    _check_weights(path, config, weights)
    weights = {name: tensor.detach().float().contiguous() for name, tensor in weights.items()}
    broken = [name for name, tensor in weights.items() if not bool(torch.isfinite(tensor).all())]
    if broken:
        raise MisfError(f"{path} holds NaN or infinite weights in {_some(broken)}: use an earlier checkpoint")
    return Checkpoint(config, weights, iteration, digest, path)


def save_checkpoint(
    path: str | os.PathLike[str],
    config: NetworkConfig,
    weights: Mapping[str, Tensor],
    iteration: int = 0,
    *,
    dtype: torch.dtype = torch.float32,
    notes: Mapping[str, str] | None = None,
) -> None:
    """Write weights and config to `path`, .safetensors or .pt, whole or not at all.

    Args:
        path: an existing file is replaced only once the new one is complete.
        config: the network that the weights belong to.
        weights: the network's state_dict.
        iteration: training steps behind the weights.
        dtype: what the tensors are stored as; float16 halves the file.
        notes: further strings kept in a safetensors file's metadata, for people to read.

    """
    path = Path(path)
    stored = {name: tensor.detach().to("cpu", dtype).contiguous() for name, tensor in weights.items()}
    with written_whole(path) as temporary:
        if path.suffix == ".safetensors":
            from safetensors.torch import save

            metadata = {"format": FORMAT, "config": config.to_json(), "iteration": str(iteration)}
            temporary.write_bytes(save(stored, {**(notes or {}), **metadata}))
        else:
            content = {"format": FORMAT, "config": asdict(config), "iteration": iteration, "network": stored}
            torch.save(content, temporary)


def _is_safetensors(path: Path) -> bool:
    """A safetensors file begins with the length of its JSON header, 8 bytes, and the header's brace."""
    with path.open("rb") as file:
        start = file.read(9)
    return path.suffix == ".safetensors" or (len(start) == 9 and start[8:] == b"{")


def _read_safetensors(path: Path, official: bool) -> tuple[NetworkConfig, dict[str, Tensor], int]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
    except SafetensorError as error:
        raise MisfError(f"{path} is not a whole safetensors file ({error}): copy or download it again") from error
    if "config" not in metadata:
        return _interpret(path, weights, official)
    if official:
        raise MisfError(f"{path} is a checkpoint of misf's own: leave out --official")
    return _config(path, metadata["config"]), weights, _iteration(metadata.get("iteration"))


def _config(path: Path, text: str) -> NetworkConfig:
    try:
        return NetworkConfig.from_json(text)
    except (ValueError, RecursionError) as error:
        raise MisfError(f"{path}: {error}") from error


def _iteration(value: object) -> int:
    """Return the training steps that a file claims, 0 where it says something else than a number."""
    if isinstance(value, str) and value.isdecimal() and len(value) < 16:
        return int(value)
    return value if isinstance(value, int) and not isinstance(value, bool) else 0


def _read_pickle(path: Path) -> dict[str, Any]:
    """Return a .pt or .pth file's dict, read without ever running code from it."""
    try:
        with warnings.catch_warnings():  # of pickle protocols; what matters is raised
            warnings.simplefilter("ignore")
            content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        if "Unsupported global" in str(error) or "Unsupported class" in str(error) or "GLOBAL" in str(error):
            raise MisfError(
                f"{path} holds pickled Python objects, which could run code when loaded, so it is refused: "
                "save a plain dict of tensors instead"
            ) from error
        raise MisfError(f"{path} is not a PyTorch checkpoint, or is damaged: copy or download it again") from error
    except RuntimeError as error:
        if "TorchScript" in str(error):
            raise MisfError(
                f"{path} is a TorchScript file, which is a program: expected a checkpoint, saved by torch.save"
            ) from error
        raise MisfError(f"{path} is not a PyTorch checkpoint, or is damaged: copy or download it again") from error
    except (EOFError, ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise MisfError(f"{path} is not a PyTorch checkpoint, or is damaged: copy or download it again") from error
    if not isinstance(content, dict):
        raise MisfError(f"{path} holds a {type(content).__name__}, expected a dict of weights")
    return content


def _interpret(path: Path, content: dict[str, Any], official: bool) -> tuple[NetworkConfig, dict[str, Tensor], int]:
    """Tell the layouts apart: ours, the official generator's, and the usual mistakes."""
    if content.get("format") == FORMAT and isinstance(content.get("network"), dict):
        if official:
            raise MisfError(f"{path} is a checkpoint of misf's own: leave out --official")
        try:
            config = json.dumps(content.get("config"))
        except TypeError as error:
            raise MisfError(f"{path} has a config that is not plain numbers and names: {error}") from error
        return _config(path, config), content["network"], _iteration(content.get("iteration"))
    if "discriminator" in content and "generator" not in content:
        raise MisfError(f"{path} is an official discriminator (*_dis.pth): give the generator's file (*_gen.pth)")
    state = content.get("generator", content.get("state_dict", content))
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()) or not state:
        keys = ", ".join(map(str, list(content)[:4]))
        raise MisfError(f"{path} holds no weights that misf knows (its keys: {keys}): expected a misf checkpoint")
    # DataParallel and torch.compile each put a word before the names.
    state = {re.sub(r"^(module\.|_orig_mod\.)+", "", str(name)): value for name, value in state.items()}
    if not any(name.startswith(("encoder0.", "kpn_model.")) for name in state):
        raise MisfError(
            f"{path} holds weights of another model (such as {_some(list(state))}): "
            "expected a misf checkpoint, or an official MISF generator with --official"
        )
    if not official:
        raise MisfError(
            f"{path} is an official MISF generator: export it with misf-export --official, "
            "or load it with load_model(path, official=True)"
        )
    return NetworkConfig(), _from_official(path, state), _iteration(content.get("iteration"))


def official_names(config: NetworkConfig) -> dict[str, str]:
    """Return the map from the official generator's parameter names to ours, without `.weight` and `.bias`.

    Source: the keys of a published checkpoint's `generator` dict.
    """
    names = {"encoder0.1": "stem", "encoder1.0": "down.0", "encoder2.0": "down.1"}
    for block in range(len(config.residual_dilations)):
        names[f"middle.{block}.conv_block.1"] = f"middle.{block}.conv1"
        names[f"middle.{block}.conv_block.5"] = f"middle.{block}.conv2"
    names |= {"decoder.0": "up.0", "decoder.3": "up.1", "decoder.7": "head"}
    blocks = {"conv1": "down.0", "conv2": "down.1", "conv3": "down.2", "conv4": "down.3"}
    blocks |= {"conv7": "up3", "conv8": "up2", "conv9": "up1"}
    for theirs, ours in blocks.items():
        for layer in (0, 2, 4):
            names[f"kpn_model.{theirs}.conv1.{layer}"] = f"prediction.{ours}.{layer}"
    names |= {"kpn_model.kernels": "prediction.feature_taps", "kpn_model.core_img": "prediction.image_taps"}
    return names


OFFICIAL_UNUSED = {"kpn_model.conv_final.weight": (3, 12, 3, 3), "kpn_model.conv_final.bias": (3,)}
"""In every official checkpoint, used by no layer of the official forward pass."""


def _from_official(path: Path, state: dict[str, Tensor]) -> dict[str, Tensor]:
    names = {
        f"{theirs}.{kind}": f"{ours}.{kind}"
        for theirs, ours in official_names(NetworkConfig()).items()
        for kind in ("weight", "bias")
    }
    shapes = {theirs: tuple(_expected_shapes(NetworkConfig())[ours]) for theirs, ours in names.items()}
    _compare(path, state, shapes | OFFICIAL_UNUSED)
    return {ours: state[theirs] for theirs, ours in names.items()}


def _expected_shapes(config: NetworkConfig) -> dict[str, torch.Size]:
    from .network import InpaintingNetwork

    with torch.device("meta"):
        return {name: tensor.shape for name, tensor in InpaintingNetwork(config).state_dict().items()}


def _check_weights(path: Path, config: NetworkConfig, weights: dict[str, Any]) -> None:
    if not all(isinstance(value, Tensor) for value in weights.values()):
        raise MisfError(f"{path} holds values that are not tensors among its weights: expected tensors only")
    _compare(path, weights, {name: tuple(shape) for name, shape in _expected_shapes(config).items()})
    strange = [
        name
        for name, tensor in weights.items()
        if not tensor.is_floating_point() or tensor.layout != torch.strided or tensor.device.type != "cpu"
    ]
    if strange:
        raise MisfError(f"{path} holds weights that are no plain floating-point tensors: {_some(strange)}")


def _compare(path: Path, weights: Mapping[str, Tensor], expected: Mapping[str, tuple[int, ...]]) -> None:
    """Raise one error that lists what is missing, extra or misshapen."""
    faults = []
    if missing := [name for name in expected if name not in weights]:
        faults.append(f"missing {_some(missing)}")
    if extra := [name for name in weights if name not in expected]:
        faults.append(f"unexpected {_some(extra)}")
    misshapen = [
        f"{name} {tuple(weights[name].shape)} instead of {shape}"
        for name, shape in expected.items()
        if name in weights and tuple(weights[name].shape) != shape
    ]
    if misshapen:
        faults.append(f"wrong shape {_some(misshapen)}")
    if faults:
        raise MisfError(f"{path} does not fit the network: {'; '.join(faults)}")


def _some(names: list[str], limit: int = 6) -> str:
    rest = len(names) - limit
    return ", ".join(map(str, names[:limit])) + (f" and {rest} more" if rest > 0 else "")
