"""Micro-batching: the answers of single calls, in fewer runs of the model."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

from misf.runtime import open_backend
from misf.runtime.engines.side_car import Limits
from misf.runtime.serving.failures import CLIENT_LEFT, RequestError
from misf.runtime.serving.micro_batching import MicroBatchingBackend, Ticket, ticket_at_work
from tests.support.serving import GatedBackend, until


@dataclass
class FakeBackend:
    """Adds the picture's mean to it, picture by picture."""

    limits: Limits | None = None
    name, device, precision, multiple, file_precision, checkpoint_sha256 = "fake", "cpu", "fp32", 1, "fp32", ""
    config: Any = None

    def __post_init__(self) -> None:
        self.config = {}

    def __call__(self, image: Any, mask: Any) -> Any:
        return image + image.mean(axis=(1, 2, 3), keepdims=True) + mask


def calls(rng: np.random.Generator, count: int, size: tuple[int, int] = (8, 12)) -> list[tuple[Any, Any]]:
    return [
        (rng.random((1, 3, *size), np.float32), (rng.random((1, 1, *size)) > 0.5).astype(np.float32))
        for _ in range(count)
    ]


def behind_a_gate(batching: MicroBatchingBackend, gate: GatedBackend, given: list[tuple[Any, Any]]) -> list[Any]:
    """Return the futures of the calls, all of which wait when the first one's run ends."""
    gate.gate.clear()
    pool = ThreadPoolExecutor(len(given))
    futures = []
    for number, (image, mask) in enumerate(given):
        futures.append(pool.submit(batching, image, mask))
        if number == 0:
            assert gate.entered.wait(10)
        until(lambda number=number: len(batching._calls) == number)  # type: ignore[misc]
    gate.gate.set()
    return futures


def test_a_batch_gives_the_very_answers_of_single_calls(rng: np.random.Generator) -> None:
    backend = open_backend("misf-small", "onnxruntime", "cpu", threads=1)
    given = calls(rng, 7, (48, 64)) + calls(rng, 2, (64, 48))
    gate, sizes = GatedBackend(backend), []
    batching = MicroBatchingBackend(gate, max_batch=4, on_batch=lambda size, _seconds: sizes.append(size))
    futures = behind_a_gate(batching, gate, given)
    for (image, mask), future in zip(given, futures, strict=True):
        assert np.array_equal(future.result(60), backend(image, mask))
    batching.close()
    assert gate.shapes[:2] == [(1, 3, 48, 64), (4, 3, 48, 64)]
    assert sorted(sizes) == [1, 2, 2, 4]


def test_only_equal_shapes_run_together_and_the_oldest_first(rng: np.random.Generator) -> None:
    gate = GatedBackend(FakeBackend())
    batching = MicroBatchingBackend(gate, max_batch=8)
    wide, tall = calls(rng, 3, (8, 16)), calls(rng, 3, (16, 8))
    given = [wide[0], tall[0], wide[1], tall[1], wide[2], tall[2]]
    futures = behind_a_gate(batching, gate, given)
    for (image, mask), future in zip(given, futures, strict=True):
        np.testing.assert_array_equal(future.result(10), FakeBackend()(image, mask))
    assert gate.shapes == [(1, 3, 8, 16), (3, 3, 16, 8), (2, 3, 8, 16)]


def test_a_call_waits_for_others_no_longer_than_the_delay(rng: np.random.Generator) -> None:
    batching = MicroBatchingBackend(FakeBackend(), delay=0.05)
    [(image, mask)] = calls(rng, 1)
    started = time.monotonic()
    batching(image, mask)
    assert 0.04 < time.monotonic() - started < 5


def test_an_engine_s_batch_and_the_option_bound_batches(rng: np.random.Generator) -> None:
    for backend, most, largest in (
        (FakeBackend(Limits((1, 8, 8), (2, 8, 8), (2, 64, 64))), 8, 2),
        (FakeBackend(), 1, 1),
    ):
        gate = GatedBackend(backend)
        for future in behind_a_gate(batching := MicroBatchingBackend(gate, most), gate, calls(rng, 5)):
            future.result(10)
        batching.close()
        assert max(shape[0] for shape in gate.shapes) == largest


def test_little_memory_makes_small_batches(rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    import misf.runtime.serving.micro_batching as module

    backend = FakeBackend()
    backend.config = {"width": 4}
    each = module.least_bytes(backend.config, "fp32", (8, 12))
    monkeypatch.setattr(module, "available_bytes", lambda: 4 * 2 * each + 1)
    gate = GatedBackend(backend)
    for future in behind_a_gate(MicroBatchingBackend(gate), gate, calls(rng, 6)):
        future.result(10)
    assert [shape[0] for shape in gate.shapes] == [1, 2, 2, 1]


def test_one_failing_call_spoils_no_other(rng: np.random.Generator) -> None:
    gate = GatedBackend(FakeBackend())
    given = calls(rng, 5)
    given[2][0][:] = 7
    gate.fails_on = lambda image: bool((image == 7).any())
    futures = behind_a_gate(MicroBatchingBackend(gate), gate, given)
    with pytest.raises(RuntimeError, match="makes the model fail"):
        futures.pop(2).result(10)
    for (image, mask), future in zip(given[:2] + given[3:], futures, strict=True):
        np.testing.assert_array_equal(future.result(10), FakeBackend()(image, mask))


@pytest.mark.parametrize("cancel", [True, False], ids=["the client leaves", "the deadline passes"])
def test_a_call_that_waits_is_never_run_when_its_ticket_ends(rng: np.random.Generator, cancel: bool) -> None:
    gate = GatedBackend(FakeBackend())
    gate.gate.clear()
    batching = MicroBatchingBackend(gate)
    first, second = calls(rng, 2)
    with ThreadPoolExecutor(2) as pool:
        running = pool.submit(batching, *first)
        assert gate.entered.wait(10)
        ticket = Ticket(60 if cancel else 0.2)

        def within_ticket() -> Any:
            ticket_at_work.set(ticket)
            return batching(*second)

        waiting = pool.submit(within_ticket)
        until(lambda: len(batching._calls) == 1)
        if cancel:
            ticket.cancel()
        with pytest.raises(RequestError) as failure:
            waiting.result(10)
        assert failure.value.status == (CLIENT_LEFT if cancel else 504)
        gate.gate.set()
        np.testing.assert_array_equal(running.result(10), FakeBackend()(*first))
    batching.close()
    assert len(gate.shapes) == 1


def test_closing_answers_what_waits_and_refuses_what_comes(rng: np.random.Generator) -> None:
    gate = GatedBackend(FakeBackend())
    batching = MicroBatchingBackend(gate)
    given = calls(rng, 4)
    futures = behind_a_gate(batching, gate, given)
    closing = threading.Thread(target=batching.close)
    closing.start()
    for (image, mask), future in zip(given, futures, strict=True):
        np.testing.assert_array_equal(future.result(10), FakeBackend()(image, mask))
    closing.join(10)
    assert not batching.alive
    with pytest.raises(RequestError, match="shutting down"):
        batching(*given[0])
