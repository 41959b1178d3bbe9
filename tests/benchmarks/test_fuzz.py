"""benchmarks/fuzz.py: finds what is wrong, and finds nothing wrong in a few cases of each kind."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from misf.runtime import jobs

from ..conftest import load_benchmark


@pytest.fixture(scope="module")
def fuzz() -> ModuleType:
    return load_benchmark("fuzz")


@pytest.mark.timeout(200)
@pytest.mark.parametrize("kind", ["picture", "mask", "checkpoint", "onnx"])
def test_a_few_cases_of_each_kind(fuzz: ModuleType, kind: str, capfd: pytest.CaptureFixture[str]) -> None:
    if kind == "checkpoint":
        pytest.importorskip("torch")
    assert fuzz.main(["--cases", "12", "--kinds", kind, "--seed", "5"]) == 0
    found = json.loads(capfd.readouterr().out)[kind]
    assert found["cases"] == 12
    assert set(found["exit_codes"]) == {"0", "1"}  # some damages are found, and some do none
    assert found["wrong"] == []
    assert 0 < found["peak_gb"] < 1


def test_what_is_wrong_is_found(fuzz: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def leave_a_file(*_arguments: object) -> None:
        (tmp_path / "left").touch()
        raise KeyError("no such key")

    monkeypatch.setattr(jobs, "plan_jobs", leave_a_file)
    _, wrong = fuzz.problems_of("picture", "RGB.png", fuzz.pictures()["RGB.png"], tmp_path)
    assert any("KeyError" in one for one in wrong)
    assert any("left" in one for one in wrong)


def test_a_worker_that_dies_is_found(fuzz: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fuzz, "__file__", "/dev/null/none.py")
    found = fuzz.fuzz("picture", 0, 2, 1e12)
    assert found["cases"] == 2
    assert len(found["wrong"]) == 2


def test_cases_are_the_same_again(fuzz: ModuleType) -> None:
    sources = fuzz.pictures()
    assert fuzz.case("picture", 3, 7, sources) == fuzz.case("picture", 3, 7, sources)
    changed = [fuzz.mutated(sources["RGB.png"], np.random.default_rng(number)) for number in range(20)]
    assert len(set(changed)) == 20
