"""Reading and writing checkpoints: ours (safetensors or .pt) and the official MISF generator files."""

from __future__ import annotations

import json
import logging
import os
import pickle
import warnings
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from ...plugins.shared.errors import MisfError
from ...plugins.shared.files import sha256, written_whole
from ...plugins.shared.shipped import shipped_checkpoint
from .config import PRESETS, NetworkConfig

if TYPE_CHECKING:
    from .network import InpaintingNetwork

log = logging.getLogger(__name__)

FORMAT = "misf-1"


@dataclass(frozen=True)
class Checkpoint:
    """The contents of a checkpoint file; the weights are float32 on the CPU."""

    config: NetworkConfig
    weights: dict[str, Tensor]
    iteration: int
    sha256: str
    path: Path
    recipe: str = ""
    """The `Recipe` that the weights were trained with, as JSON; "" if the file does not say."""


def load_model(path: str | os.PathLike[str], *, config: NetworkConfig | None = None) -> InpaintingNetwork:
    """Return the network of a checkpoint in eval mode, on the CPU, in float32: (image, mask) -> prediction.

    Args:
        path: a .safetensors, .pt or .pth file from misf or of the official generator, or with weights alone; or the
            name of a network that comes with misf, such as "misf-small".
        config: the network of a file with weights alone; needed if no preset has the same names and shapes.

    Raises:
        MisfError: the file is not such a checkpoint; the message says what it is instead.
        OSError: the file cannot be read.

    """
    return build_model(load_checkpoint(path, config=config))


def build_model(checkpoint: Checkpoint) -> InpaintingNetwork:
    """Return the network of a loaded checkpoint in eval mode."""
    from .network import InpaintingNetwork

    with torch.device("meta"):
        network = InpaintingNetwork(checkpoint.config)
    network.load_state_dict(checkpoint.weights, assign=True)
    return network.eval().requires_grad_(False)


def take_weights(network: InpaintingNetwork, weights: Mapping[str, Tensor]) -> None:
    """Copy the weights that fit `network` by name and shape, and log which layers keep the values they have.

    Raises:
        MisfError: no weight fits.

    """
    state = network.state_dict()
    fitting = {name: value for name, value in weights.items() if name in state and value.shape == state[name].shape}
    if not fitting:
        raise MisfError("none of the weights of --init-from fits the network of --config")
    network.load_state_dict(fitting, strict=False)
    if missing := sorted({name.rpartition(".")[0] for name in state.keys() - fitting.keys()}):
        log.info("%d of %d weights taken from --init-from; new: %s", len(fitting), len(state), ", ".join(missing))


def load_checkpoint(path: str | os.PathLike[str], *, config: NetworkConfig | None = None) -> Checkpoint:
    """Return the contents of a checkpoint file, with all names and shapes checked.

    Arguments and errors are those of `load_model`.
    """
    path = shipped_checkpoint(path)
    if path.is_dir():
        raise MisfError(f"{path} is a folder, expected a checkpoint file (.safetensors, .pt or .pth)")
    digest = sha256(path)
    if path.stat().st_size == 0:
        raise MisfError(f"{path} is empty, expected a checkpoint: was its download or copy interrupted?")
    content = _read_safetensors(path) if _is_safetensors(path) else _read_pickle(path)
    found, weights = _interpret(path, content, config)
    _check_weights(path, found, weights)
    weights = {name: tensor.detach().float().contiguous() for name, tensor in weights.items()}
    broken = [name for name, tensor in weights.items() if not bool(torch.isfinite(tensor).all())]
    if broken:
        raise MisfError(f"{path} holds NaN or infinite weights in {_some(broken)}: use an earlier checkpoint")
    iteration = _iteration(content.get("iteration", content.get("global_step")))
    recipe = content.get("recipe", "")
    return Checkpoint(found, weights, iteration, digest, path, recipe if isinstance(recipe, str) else "")


def save_checkpoint(
    path: str | os.PathLike[str],
    config: NetworkConfig,
    weights: Mapping[str, Tensor],
    iteration: int = 0,
    *,
    dtype: torch.dtype = torch.float32,
    notes: Mapping[str, str] | None = None,
) -> None:
    """Write weights and config to `path`, .safetensors or .pt, atomically.

    Args:
        path: an existing file is replaced only once the new one is complete.
        config: the network that the weights belong to.
        weights: the network's state_dict.
        iteration: number of training steps that the weights have seen.
        dtype: the dtype in the file; float16 halves its size.
        notes: further strings for the metadata of a safetensors file, for people to read.

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
    """Return whether this is a safetensors file: 8 bytes with the length of a JSON header, then the header's brace."""
    with path.open("rb") as file:
        start = file.read(9)
    return path.suffix == ".safetensors" or (len(start) == 9 and start[8:] == b"{")


def _read_safetensors(path: Path) -> dict[str, Any]:
    """Return a safetensors file as the dict that a .pt file of the same kind holds."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
    except SafetensorError as error:
        raise MisfError(f"{path} is not a complete safetensors file ({error}): copy or download it again") from error
    if "config" not in metadata:
        return weights
    return {**metadata, "format": FORMAT, "network": weights}


def _own_config(path: Path, saved: object) -> NetworkConfig:
    """Return the config in a checkpoint of ours, which is JSON in a safetensors file and a dict in a .pt file."""
    try:
        return NetworkConfig.from_json(saved if isinstance(saved, str) else json.dumps(saved))
    except TypeError as error:
        raise MisfError(f"{path} has a config with values other than plain numbers and names: {error}") from error
    except (ValueError, RecursionError) as error:
        raise MisfError(f"{path}: {error}") from error


def _iteration(value: object) -> int:
    """Return a file's number of training steps, or 0 if it is not a number."""
    if isinstance(value, str) and value.isdecimal() and len(value) < 16:
        return int(value)
    return value if isinstance(value, int) and not isinstance(value, bool) else 0


class _Ignored:
    """Replaces every class of IGNORED_MODULES: its objects become empty dicts, and none of its code runs."""

    def __new__(cls, *_: object, **__: object) -> OrderedDict[object, object]:  # type: ignore[misc]
        return OrderedDict()  # the only type that torch.load can fill in every way of pickling an object


IGNORED_MODULES = (
    "argparse",
    "lightning",
    "lightning_fabric",
    "pytorch_lightning",
    "omegaconf",
    "pathlib",
    "yacs",
    "easydict",
    "typing",
)
"""Modules whose objects training programs save beside the weights as settings. These objects are ignored."""


PLAIN_CLASSES = ((_Ignored, "collections.defaultdict"), dict, list, tuple, set, str, int, float, bool)
"""What settings name, OmegaConf's among them, and what does nothing."""

NUMPY_CLASSES = (np.dtype, *(getattr(np.dtypes, name) for name in np.dtypes.__all__))
NUMPY_SCALAR = ("numpy.core.multiarray.scalar", "numpy._core.multiarray.scalar")
"""What makes NumPy's numbers, such as a best score; the names of the function before NumPy 2 and since."""


def _read_pickle(path: Path) -> dict[str, Any]:
    """Return the dict in a .pt or .pth file; no code from the file runs."""
    damaged = f"{path} is not a PyTorch checkpoint, or is damaged: copy or download it again"
    try:
        with warnings.catch_warnings():  # about pickle protocols; real problems raise
            warnings.simplefilter("ignore")
            with torch.serialization.safe_globals(_ignored_classes(path)):
                content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        if "Unsupported global" in str(error) or "Unsupported class" in str(error) or "GLOBAL" in str(error):
            raise MisfError(
                f"{path} holds pickled Python objects, which could run code when loaded, so it is refused: save only "
                "the weights where it was made, torch.save(network.state_dict(), FILE)"
            ) from error
        raise MisfError(damaged) from error
    except RuntimeError as error:
        if "TorchScript" in str(error):
            raise MisfError(
                f"{path} is a TorchScript program, expected weights; save those: "
                "torch.save(torch.jit.load(FILE).state_dict(), 'weights.pt')"
            ) from error
        raise MisfError(damaged) from error
    except Exception as error:  # as many classes as ways to be damaged; torch's own OSError names no file
        if isinstance(error, MemoryError) or (isinstance(error, OSError) and error.filename):
            raise
        raise MisfError(damaged) from error
    if not isinstance(content, dict):
        raise MisfError(f"{path} holds a {type(content).__name__}, expected a dict of weights")
    return content


def _ignored_classes(path: Path) -> list[Any]:
    """Return pairs of `_Ignored` and the name of a class, for every class in the file from IGNORED_MODULES."""
    try:
        names = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    except Exception:  # loading the file gives a better message, whatever is wrong with it
        return []
    ignored = [(_Ignored, name) for name in names if name.split(".")[0] in IGNORED_MODULES]
    scalar = np.float64(0).__reduce__()[0]
    return [*ignored, *((scalar, name) for name in NUMPY_SCALAR), *NUMPY_CLASSES, *PLAIN_CLASSES]


WRAPPERS = ("generator", "state_dict", "model_state_dict", "model", "params_ema", "params", "network", "weights")
"""Keys under which training programs save the weights."""


def _interpret(
    path: Path, content: dict[str, Any], config: NetworkConfig | None
) -> tuple[NetworkConfig, dict[str, Tensor]]:
    """Return config and weights from a file's contents: ours, the official generator's, or weights alone."""
    if content.get("format") == FORMAT and isinstance(content.get("network"), dict):
        own = _own_config(path, content.get("config"))
        if config not in (None, own):
            raise MisfError(f"{path} holds its network's config, which differs from the one given: leave out --config")
        return own, content["network"]
    if "discriminator" in content and "generator" not in content:
        raise MisfError(f"{path} is an official discriminator (*_dis.pth): give the generator's file (*_gen.pth)")
    wrapped = [content[key] for key in WRAPPERS if isinstance(content.get(key), dict)]
    of_tensors = (inner for inner in wrapped if any(isinstance(value, Tensor) for value in inner.values()))
    state = next(of_tensors, wrapped[0] if wrapped else content)  # others hold settings
    if not all(isinstance(value, Tensor) for value in state.values()) or not state:
        keys = ", ".join(map(str, list(content)[:4]))
        raise MisfError(f"{path} holds no weights that misf recognises (keys: {keys}): expected a misf checkpoint")
    # torch.compile inserts this into the names of compiled modules.
    state = {str(name).replace("_orig_mod.", ""): value for name, value in state.items()}
    if official := _one_network(path, state, OFFICIAL_MARKS):
        log.info("%s is a generator of the official MISF repository", path.name)
        if config not in (None, NetworkConfig()):
            raise MisfError(f"{path} is an official generator, whose config is always misf: leave out --config")
        return NetworkConfig(), _from_official(path, official)
    weights = _one_network(path, state, OWN_MARKS)
    if not weights:
        raise MisfError(
            f"{path} holds weights of another model (such as {_some(list(state))}): "
            "expected a misf checkpoint, or an official MISF generator (*_gen.pth)"
        )
    return config or _preset_of(path, weights), weights


OFFICIAL_MARKS = ("encoder0.1.weight", "kpn_model.kernels.weight")
OWN_MARKS = ("prediction.feature_taps.weight", "stem.weight")


def _one_network(path: Path, state: Mapping[str, Tensor], marks: tuple[str, ...]) -> dict[str, Tensor]:
    """Return the weights that share a prefix with one named as in `marks`, without that prefix; {} if there is none.

    DataParallel prefixes names with "module.", Lightning with the attribute that holds the network. Weights with other
    prefixes, such as a discriminator's, are dropped.
    """
    found = ([name.removesuffix(mark) for name in state if f".{name}".endswith(f".{mark}")] for mark in marks)
    prefixes = next(filter(None, found), [])
    if len(prefixes) > 1:
        raise MisfError(f"{path} holds {len(prefixes)} networks ({_some(prefixes)}): save the weights of just one")
    if not prefixes:
        return {}
    return {name.removeprefix(prefixes[0]): value for name, value in state.items() if name.startswith(prefixes[0])}


def _preset_of(path: Path, weights: Mapping[str, Tensor]) -> NetworkConfig:
    """Return the config of the preset that has the names and shapes of these weights."""
    shapes = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    for name, config in PRESETS.items():
        if shapes == {key: tuple(shape) for key, shape in _expected_shapes(config).items()}:
            log.info("%s holds no config, but its weights fit the preset %s", path.name, name)
            return config
    raise MisfError(
        f"{path} holds weights without their network's config (such as {_some(list(weights), 3)}), and no preset fits: "
        "misf-export takes it by --config FILE (the JSON of NetworkConfig.to_json, or a run's run.json)"
    )


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
"""Weights in every official checkpoint that the official forward pass does not use."""


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
        raise MisfError(f"{path} holds other values than tensors among its weights: expected tensors only")
    _compare(path, weights, {name: tuple(shape) for name, shape in _expected_shapes(config).items()})
    strange = [
        name
        for name, tensor in weights.items()
        if not tensor.is_floating_point() or tensor.layout != torch.strided or tensor.device.type != "cpu"
    ]
    if strange:
        raise MisfError(f"{path} holds weights that are not plain floating-point tensors: {_some(strange)}")


def _compare(path: Path, weights: Mapping[str, Tensor], expected: Mapping[str, tuple[int, ...]]) -> None:
    """Raise one MisfError that lists missing and unexpected weights and wrong shapes, if there are any."""
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
