"""Captures and everybody else, in real threads."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from typing import Any

import pytest

from service.engine import capture_lock as gate_module
from service.engine.capture_lock import CaptureGate
from service.engine.session import EngineError

WAIT = 5.0  # seconds until a test gives up; none waits for so long when all is well


def in_thread(work: Any) -> tuple[threading.Thread, threading.Event]:
    ended = threading.Event()

    def run() -> None:
        work()
        ended.set()

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    return thread, ended


def test_users_share_the_gate() -> None:
    gate = CaptureGate()
    with gate.shared():
        _, ended = in_thread(lambda: gate.shared().__enter__())
        assert ended.wait(WAIT)


def test_a_capture_waits_for_users_and_those_who_come_later_wait_for_it() -> None:
    gate = CaptureGate()
    order: list[str] = []

    def capture() -> None:
        with gate.exclusive():
            order.append("capture")

    def use() -> None:
        with gate.shared():
            order.append("use")

    with gate.shared():
        capturing, _ = in_thread(capture)
        while not gate._waiting:  # it has come, and waits
            capturing.join(0.001)
        using, _ = in_thread(use)  # must not overtake it, or a busy service would never let a capture begin
        using.join(0.02)
        assert order == []
    for thread in (capturing, using):
        thread.join(WAIT)
    assert order == ["capture", "use"]


def test_who_was_held_up_by_a_capture_goes_before_the_next() -> None:
    gate = CaptureGate()
    order: list[str] = []

    def use() -> None:
        with gate.shared():
            order.append("use")

    with gate.exclusive():
        using, _ = in_thread(use)
        while not gate._held_up:
            using.join(0.001)
    with gate.exclusive():  # a warm-up captures one batch size after another
        order.append("capture")
    using.join(WAIT)
    assert order == ["use", "capture"]


def most_inside_with_a_capture(gate: CaptureGate) -> int:
    """Threads that were seen inside at a time, one of them capturing."""
    lock = threading.Lock()
    inside: set[int] = set()
    seen: list[int] = []

    def look(number: int) -> None:
        with lock:
            seen.append(len(inside) if 0 in inside else 0)

    def work(number: int) -> None:
        for _ in range(50):
            with gate.exclusive() if number == 0 else gate.shared():
                with lock:
                    inside.add(number)
                look(number)
                time.sleep(0.0005)  # for the others to come in
                look(number)
                with lock:
                    inside.discard(number)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, range(4)))
    return max(seen)


def test_nobody_is_inside_while_one_captures() -> None:
    class Open(CaptureGate):
        def exclusive(self) -> nullcontext[None]:  # type: ignore[override]
            return nullcontext()

    assert most_inside_with_a_capture(CaptureGate()) == 1
    assert most_inside_with_a_capture(Open()) > 1  # so it would be seen


def test_who_never_lets_go_of_the_gate_keeps_captures_away_and_nobody_else(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gate_module, "CAPTURE_PATIENCE_SECONDS", 0.1)
    gate = CaptureGate()

    def use() -> None:
        with gate.shared():
            pass

    def give_up() -> None:
        with pytest.raises(EngineError, match="in use"), gate.exclusive():
            pass

    with gate.shared():  # as a load that hangs in the driver and was given up
        for _ in range(2):
            capturing, gave_up = in_thread(give_up)
            while not (gate._waiting or gave_up.is_set()):
                capturing.join(0.001)
            others = [in_thread(use) for _ in range(3)]  # which wait behind the capture, and go on when it gives up
            assert all(ended.wait(WAIT) for _, ended in others)
            assert gave_up.wait(WAIT)
    with gate.exclusive():
        pass


def test_a_capture_goes_on_waiting_where_another_came_before_it() -> None:
    gate = CaptureGate()
    waits: list[Any] = []

    class Changed(threading.Condition):
        def wait_for(self, predicate: Any, timeout: float | None = None) -> bool:
            waits.append(timeout)
            if len(waits) > 1:
                return super().wait_for(predicate, timeout)
            gate._captures += 1  # another thread's, in the time that has passed
            return False

    gate._changed = Changed()
    with gate.exclusive():
        assert waits == [gate_module.CAPTURE_PATIENCE_SECONDS] * 2


def test_the_gate_opens_again_after_an_error() -> None:
    gate = CaptureGate()
    for enter in (gate.shared, gate.exclusive, gate.exclusive, gate.shared):
        with pytest.raises(RuntimeError, match="out of memory"), enter():
            raise RuntimeError("out of memory")
