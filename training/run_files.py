"""The folder of a training run: its state (written atomically), its weights and its log.

state.pt            everything that --resume needs
ema.safetensors     the averaged weights, ready for misf-export
best.safetensors    the averaged weights with the best validation so far, if the run validates
run.json            the recipe and the paths of the data
log.jsonl           one line of numbers per logged step
tensorboard/        the same numbers as curves, and pictures
"""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..plugins.shared.errors import MisfError
from ..plugins.shared.files import remove_unfinished, written_whole

log = logging.getLogger(__name__)

FORMAT = "misf-training-2"


class RunFolder:
    """The files of one run, listed in the module's docstring."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.state = path / "state.pt"
        self.weights = path / "ema.safetensors"
        self.best = path / "best.safetensors"
        self.settings = path / "run.json"
        self.log = path / "log.jsonl"

    @property
    def exists(self) -> bool:
        """Whether the folder holds a run."""
        return self.settings.exists() or self.state.exists()

    def write_settings(self, settings: dict[str, Any]) -> None:
        """Create the folder and write run.json."""
        self.path.mkdir(parents=True, exist_ok=True)
        with written_whole(self.settings) as temporary:
            temporary.write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n", encoding="utf-8")

    def read_settings(self) -> dict[str, Any]:
        """Return what `write_settings` wrote.

        Raises:
            MisfError: run.json is missing or damaged.

        """
        try:
            settings = json.loads(self.settings.read_text(encoding="utf-8"))
        except FileNotFoundError as error:
            raise MisfError(f"{self.path} holds no training run: it has no {self.settings.name}") from error
        except ValueError as error:
            raise MisfError(f"{self.settings} is damaged: {error}") from error
        if not isinstance(settings, dict):
            raise MisfError(f"{self.settings} is damaged: expected a JSON object")
        return settings

    def write_state(self, state: dict[str, Any]) -> None:
        """Write state.pt atomically: if the process is killed meanwhile, the previous state remains."""
        with written_whole(self.state) as temporary, temporary.open("wb") as file:
            torch.save({"format": FORMAT, **state}, file)
            file.flush()

    def read_state(self) -> dict[str, Any] | None:
        """Return what `write_state` wrote, on the CPU, or None if no state has been saved yet.

        Raises:
            MisfError: state.pt is damaged or holds something else.

        """
        if not self.state.exists():
            return None
        try:
            state = torch.load(self.state, map_location="cpu", weights_only=True)
        except (PermissionError, MemoryError):
            raise
        except Exception as error:  # of damaged bytes, whatever the unpickler stumbles over
            raise MisfError(f"{self.state} is damaged: start a new run with --init-from {self.weights}") from error
        if not isinstance(state, dict) or state.get("format") != FORMAT:
            raise MisfError(f"{self.state} is not the state of a training run by this version of misf")
        return state


class RunLog:
    """Numbers and pictures of a run: log.jsonl and, if it is installed, TensorBoard.

    Entries after `step`, where a resumed run continues, are dropped, because the run will log them again.
    """

    def __init__(self, folder: RunFolder, step: int) -> None:
        self.file = folder.log
        remove_unfinished(folder.path)
        kept = self._lines_before(step)
        with written_whole(self.file) as temporary:
            temporary.write_text("".join(kept), encoding="utf-8")
        self.board = _board(folder.path / "tensorboard", step)

    def _lines_before(self, step: int) -> list[str]:
        if not self.file.exists():
            return []
        kept = []
        for line in self.file.read_text(encoding="utf-8").splitlines(keepends=True):
            try:
                entry = json.loads(line)
            except ValueError:  # the process was killed while writing this line
                break
            if entry["step"] <= step:
                kept.append(line)
        return kept

    def numbers(self, step: int, values: dict[str, float]) -> None:
        """Log named numbers after `step` steps."""
        with self.file.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, **values}) + "\n")
        if self.board is not None:
            for name, value in values.items():
                self.board.add_scalar(name, value, step)

    def pictures(self, step: int, rows: list[Tensor]) -> None:
        """Log a grid: each of `rows` is N,3,H,W in [0,1], on any device; columns are samples."""
        if self.board is not None:
            grid = torch.cat([torch.cat(list(row.float().cpu()), dim=2) for row in rows], dim=1)
            self.board.add_image("damaged, filled, true", grid.clamp(0, 1), step)

    def close(self) -> None:
        """Flush the log and close it."""
        if self.board is not None:
            self.board.close()


def _board(path: Path, step: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        log.info("TensorBoard is not installed, so there are no curves: pip install tensorboard")
        return None
    return SummaryWriter(str(path), purge_step=step + 1 if step else None)
