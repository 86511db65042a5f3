"""Captures and other users of CUDA, in real threads."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from typing import Any

import pytest

from service.engine import capture_lock as module
from service.engine.capture_lock import CaptureLock
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


def test_users_share_the_lock() -> None:
    lock = CaptureLock()
    with lock.shared():
        _, ended = in_thread(lambda: lock.shared().__enter__())
        assert ended.wait(WAIT)


def test_a_capture_waits_for_users_and_later_users_wait_for_it() -> None:
    lock = CaptureLock()
    order: list[str] = []

    def capture() -> None:
        with lock.exclusive():
            order.append("capture")

    def use() -> None:
        with lock.shared():
            order.append("use")

    with lock.shared():
        capturing, _ = in_thread(capture)
        while not lock._waiting:  # it has come, and waits
            capturing.join(0.001)
        using, _ = in_thread(use)  # must not overtake it, or a busy service would never let a capture begin
        using.join(0.02)
        assert order == []
    for thread in (capturing, using):
        thread.join(WAIT)
    assert order == ["capture", "use"]


def test_users_held_up_by_a_capture_go_before_the_next_one() -> None:
    lock = CaptureLock()
    order: list[str] = []

    def use() -> None:
        with lock.shared():
            order.append("use")

    with lock.exclusive():
        using, _ = in_thread(use)
        while not lock._held_up:
            using.join(0.001)
    with lock.exclusive():  # a warm-up captures one batch size after another
        order.append("capture")
    using.join(WAIT)
    assert order == ["use", "capture"]


def max_inside_with_a_capture(lock: CaptureLock) -> int:
    """Largest number of threads inside the lock during a capture."""
    mutex = threading.Lock()
    inside: set[int] = set()
    seen: list[int] = []

    def count(number: int) -> None:
        with mutex:
            seen.append(len(inside) if 0 in inside else 0)

    def work(number: int) -> None:
        for _ in range(50):
            with lock.exclusive() if number == 0 else lock.shared():
                with mutex:
                    inside.add(number)
                count(number)
                time.sleep(0.0005)  # for the others to come in
                count(number)
                with mutex:
                    inside.discard(number)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, range(4)))
    return max(seen)


def test_no_user_is_inside_during_a_capture() -> None:
    class Open(CaptureLock):
        def exclusive(self) -> nullcontext[None]:  # type: ignore[override]
            return nullcontext()

    assert max_inside_with_a_capture(CaptureLock()) == 1
    assert max_inside_with_a_capture(Open()) > 1  # so it would be seen


def test_a_user_that_never_releases_the_lock_blocks_captures_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CAPTURE_TIMEOUT_S", 0.1)
    lock = CaptureLock()

    def use() -> None:
        with lock.shared():
            pass

    def give_up() -> None:
        with pytest.raises(EngineError, match="in use"), lock.exclusive():
            pass

    with lock.shared():  # as a load that hangs in the driver and was given up
        for _ in range(2):
            capturing, gave_up = in_thread(give_up)
            while not (lock._waiting or gave_up.is_set()):
                capturing.join(0.001)
            others = [in_thread(use) for _ in range(3)]  # which wait behind the capture, and go on when it gives up
            assert all(ended.wait(WAIT) for _, ended in others)
            assert gave_up.wait(WAIT)
    with lock.exclusive():
        pass


def test_a_capture_goes_on_waiting_where_another_came_before_it() -> None:
    lock = CaptureLock()
    waits: list[Any] = []

    class Changed(threading.Condition):
        def wait_for(self, predicate: Any, timeout: float | None = None) -> bool:
            waits.append(timeout)
            if len(waits) > 1:
                return super().wait_for(predicate, timeout)
            lock._captures += 1  # another thread's, in the time that has passed
            return False

    lock._changed = Changed()
    with lock.exclusive():
        assert waits == [module.CAPTURE_TIMEOUT_S] * 2


def test_the_lock_is_released_after_an_error() -> None:
    lock = CaptureLock()
    for enter in (lock.shared, lock.exclusive, lock.exclusive, lock.shared):
        with pytest.raises(RuntimeError, match="out of memory"), enter():
            raise RuntimeError("out of memory")
