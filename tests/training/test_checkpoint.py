"""Checkpoints: files round-trip, and every wrong file gets the right message without running its code."""

from __future__ import annotations

import os
import pickle
import struct
import warnings
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from misf.plugins.shared.errors import MisfError
from misf.training import PRESETS, load_model
from misf.training.model.checkpoint import load_checkpoint, official_names, save_checkpoint
from misf.training.model.config import NetworkConfig
from misf.training.model.network import InpaintingNetwork

TINY = PRESETS["misf-tiny"]


@pytest.fixture(scope="module")
def weights() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return InpaintingNetwork(TINY).state_dict()


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_round_trip(tmp_path: Path, weights: dict[str, torch.Tensor], suffix: str, dtype: torch.dtype) -> None:
    path = tmp_path / f"x{suffix}"
    save_checkpoint(path, TINY, weights, 42, dtype=dtype, notes={"data": "none"})
    loaded = load_checkpoint(path)
    assert (loaded.config, loaded.iteration) == (TINY, 42)
    for name, tensor in weights.items():
        assert torch.equal(loaded.weights[name], tensor.to(dtype).float())
    assert not load_model(path).training
    assert list(tmp_path.iterdir()) == [path]


def test_a_failed_save_loses_nothing(
    tmp_path: Path, weights: dict[str, torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "x.pt"
    path.write_bytes(b"precious")

    def full_disk(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full_disk)
    with pytest.raises(OSError, match=r"x\.pt.*No space left"):
        save_checkpoint(path, TINY, weights)
    assert path.read_bytes() == b"precious"
    assert list(tmp_path.iterdir()) == [path]


class Malicious:
    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.target),)


def test_a_pickle_that_would_run_code_is_refused(tmp_path: Path) -> None:
    proof = tmp_path / "code-ran"
    for name, protocol in (("zip.pt", None), ("bare.pth", 2), ("bare4.pth", 4)):
        path = tmp_path / name
        if protocol is None:
            torch.save({"generator": Malicious(proof)}, path)
        else:
            path.write_bytes(pickle.dumps({"generator": Malicious(proof)}, protocol))
        with pytest.raises(MisfError, match=r"run code|damaged") as caught:
            load_checkpoint(path)
        assert "\n" not in str(caught.value)
        assert not proof.exists()


def official_state() -> dict[str, torch.Tensor]:
    """Return a state dict with the names and shapes of an official generator, all zeros."""
    with torch.device("meta"):
        ours = InpaintingNetwork(NetworkConfig()).state_dict()
    state = {
        f"{theirs}.{kind}": torch.zeros(1).expand(ours[f"{name}.{kind}"].shape)
        for theirs, name in official_names(NetworkConfig()).items()
        for kind in ("weight", "bias")
    }
    state["kpn_model.conv_final.weight"] = torch.zeros(3, 12, 3, 3)
    return state | {"kpn_model.conv_final.bias": torch.zeros(3)}


def wrong_files() -> dict[str, tuple[Any, str]]:
    """Return contents for torch.save (bytes are written unchanged), and the expected message."""
    state = official_state()
    first = "encoder0.1.weight"
    less = {name: value for name, value in state.items() if name != first}
    header = b'{"w":{"dtype":"F32","shape":[9],"data_offsets":[0,36]}}'
    return {
        "empty.pt": (b"", "is empty"),
        "text.pt": (b"weights go here", "not a PyTorch checkpoint"),
        "short.safetensors": (struct.pack("<Q", len(header)) + header + b"1234", "not a complete safetensors"),
        "no_config.safetensors": (
            struct.pack("<Q", len(header)) + header + bytes(36),
            "holds weights of another model",
        ),
        "huge_header.safetensors": (struct.pack("<Q", 1 << 60) + b"{", "not a complete safetensors"),
        "list.pt": ([1, 2], "holds a list"),
        "discriminator.pth": ({"discriminator": state}, "discriminator.*generator's file"),
        "missing.pth": ({"generator": less}, f"missing {first}"),
        "extra.pth": ({"generator": {**state, "encoder9.weight": torch.zeros(1)}}, "unexpected encoder9.weight"),
        "shape.pth": ({"generator": {**state, first: torch.zeros(64, 3, 7, 7)}}, r"\(64, 3, 7, 7\) instead of"),
        "other.pth": ({"state_dict": {"layer1.weight": torch.zeros(3)}}, "another model.*layer1.weight"),
        "optimizer.pth": ({"optimizer": {"lr": 0.1}}, "optimizer"),
        "ours_bad_config.pt": ({"format": "misf-1", "config": {"width": -3}, "network": {}}, "1..1024"),
        "ours_no_weights.pt": ({"format": "misf-1", "config": {"width": 8}, "network": {}}, "missing"),
        "ours_odd_config.pt": ({"format": "misf-1", "config": {"width": {8}}, "network": {}}, "plain numbers"),
        "ours_not_bool.pt": (
            {"format": "misf-1", "config": {"normalize": "no"}, "network": {}},
            "true or false",
        ),
        "sparse.pth": ({"generator": {**state, first: torch.zeros(64, 4, 7, 7).to_sparse()}}, "not plain"),
        "two.pth": (
            {"state_dict": {f"{w}.{first}": state[first] for w in ("net", "ema")}},
            "2 networks.*ema",
        ),
        "no_preset.pth": ({"stem.weight": torch.zeros(5, 4, 7, 7)}, "no preset fits.*--config"),
    }


@pytest.mark.parametrize("name", wrong_files())
def test_wrong_files_are_told_apart(tmp_path: Path, name: str) -> None:
    content, message = wrong_files()[name]
    path = tmp_path / name
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        torch.save(content, path)
    with pytest.raises(MisfError, match=message) as caught:
        load_checkpoint(path)
    assert "\n" not in str(caught.value)
    assert name in str(caught.value)


@pytest.mark.parametrize("form", ["bare", "module.", "state_dict"])
def test_official_layouts_that_are_accepted(tmp_path: Path, form: str) -> None:
    state = {("module." if form == "module." else "") + name: value for name, value in official_state().items()}
    torch.save({"state_dict": state} if form == "state_dict" else state, tmp_path / "x.pth")
    assert load_checkpoint(tmp_path / "x.pth").config == NetworkConfig()


def test_weights_alone_are_recognised_and_what_lies_beside_them_is_left_out(
    tmp_path: Path,
) -> None:
    """A plain state dict, one of a wrapped and compiled network, and a Lightning checkpoint with settings."""
    from lightning_fabric.utilities.data import AttributeDict  # Lightning's class for a module's settings

    with torch.device("meta"):
        names = InpaintingNetwork(PRESETS["misf-tiny"]).state_dict()
    state = {name: torch.full(tensor.shape, 0.5) for name, tensor in names.items()}
    beside = {"discriminator.stem2.weight": torch.zeros(3), "loss.scale": torch.zeros(())}
    lightning = {f"generator.{name}": value for name, value in state.items()} | beside
    settings = {"hyper_parameters": AttributeDict(rate=1e-4, folder=Path("data")), "global_step": 70}
    files: dict[str, Any] = {
        "plain.pt": state,
        "averaged.pt": {"params_ema": {f"module._orig_mod.{name}": value for name, value in state.items()}},
        "settings.pt": {"network": state, "generator": {}, "model": {"name": "misf", "width": 8}},
        "scores.pt": {"weights": state, "best": np.float64(3.2), "by_band": defaultdict(dict, {"a": {1: 2.0}})},
        "last.ckpt": {"state_dict": lightning, "epoch": 3, "optimizer_states": [{}], **settings},
    }
    for name, content in files.items():
        torch.save(content, tmp_path / name)
    for name in files:
        loaded = load_checkpoint(tmp_path / name)
        assert loaded.config == PRESETS["misf-tiny"]
        assert loaded.weights.keys() == state.keys()
    assert loaded.iteration == 70
    assert load_checkpoint(tmp_path / "plain.pt", config=PRESETS["misf-tiny"]).config == PRESETS["misf-tiny"]
    with pytest.raises(MisfError, match="missing"):
        load_checkpoint(tmp_path / "plain.pt", config=PRESETS["misf-small"])


def test_truncated_at_any_point(tmp_path: Path, weights: dict[str, torch.Tensor]) -> None:
    for suffix in (".pt", ".safetensors"):
        whole, cut = tmp_path / f"whole{suffix}", tmp_path / f"cut{suffix}"
        save_checkpoint(whole, TINY, weights)
        content = whole.read_bytes()
        for length in (1, 8, 9, 100, len(content) // 2, len(content) - 1):
            cut.write_bytes(content[:length])
            with pytest.raises(MisfError, match=r"cut\."):
                load_checkpoint(cut)


def test_not_a_file(tmp_path: Path) -> None:
    with pytest.raises(MisfError, match="is a folder"):
        load_checkpoint(tmp_path)
    with pytest.raises(FileNotFoundError):
        load_checkpoint(tmp_path / "absent.pt")


def test_nan_weights_are_refused(tmp_path: Path, weights: dict[str, torch.Tensor]) -> None:
    broken = {**weights, "stem.bias": torch.full_like(weights["stem.bias"], torch.nan)}
    save_checkpoint(tmp_path / "x.pt", TINY, broken)
    with pytest.raises(MisfError, match=r"NaN or infinite weights in stem\.bias"):
        load_model(tmp_path / "x.pt")


def test_official_weights_load_from_safetensors_and_from_a_compiled_network(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    state = {name: tensor.contiguous() for name, tensor in official_state().items()}
    save_file(state, tmp_path / "official.safetensors")
    torch.save({"generator": {f"_orig_mod.module.{name}": value for name, value in state.items()}}, tmp_path / "c.pth")
    for name in ("official.safetensors", "c.pth"):
        loaded = load_checkpoint(tmp_path / name).weights
        assert torch.equal(loaded["stem.weight"], state["encoder0.1.weight"])


def test_torchscript_is_told_as_what_it_is(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # TorchScript is deprecated
        torch.jit.save(torch.jit.trace(torch.nn.Linear(2, 2), torch.zeros(1, 2)), tmp_path / "script.pt")
    with pytest.raises(MisfError, match="is a TorchScript program, expected weights"):
        load_checkpoint(tmp_path / "script.pt")
