"""The model that another process runs, seen from a process that speaks HTTP: the way there, and who waits."""

import asyncio
import math
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, Final, Self, cast

from service.artifact import ModelMetadata
from service.errors import DeadlineExceeded, NotReady, Overloaded, ServiceError
from service.fair_queue import Image, Outcome, Pixels, Prediction, end_safely
from service.front import known_route
from service.ledger import Ledger
from service.link import Link
from service.messages import Called, Cancel, Counts, Released, Submit
from service.recurring import Recurring

MOST_TIMES: Final = 1024  # in one message
GONE: Final = "The process that runs the model has ended."
SILENT: Final = "The process that runs the model does not answer."
SILENCE_SECONDS: Final = 0.1  # of the process that runs the model, after which it is not left to say what is too late
PATIENCE_SECONDS: Final = 3.0  # with such a silence, of those who have no deadline: probes and scrapes among them


class Notes:
    """What happened to requests, until it is sent to the process that has the metrics; a `RequestObserver`.

    Args:
        link: where to.
    """

    def __init__(self, link: Link) -> None:
        self._link = link
        self._forget()

    def request(self, route: str, status: int) -> None:
        """Count one answered request."""
        self._answered[known_route(route), status] += 1

    def predicted(self, seconds: float, request_id: str) -> None:
        """Time one request to /predict."""
        self._request_seconds.append((seconds, request_id))
        if len(self._request_seconds) >= MOST_TIMES:
            if self._link.is_full:  # nobody reads: the numbers go on, the times would pile up
                self._request_seconds.clear()
                self._decode_seconds.clear()
            else:
                self.send()

    def decoded(self, seconds: float) -> None:
        """Time the decoding of one request's pictures."""
        self._decode_seconds.append(seconds)

    def rejected(self, code: str) -> None:
        """Count one request that ended in an error."""
        self._rejected[code] += 1

    def send(self) -> None:
        """Send them, and begin anew."""
        self._link.send(
            Counts(
                answered=[(route, status, number) for (route, status), number in self._answered.items()],
                rejected=list(self._rejected.items()),
                request_seconds=self._request_seconds,
                decode_seconds=self._decode_seconds,
            )
        )
        self._forget()

    def _forget(self) -> None:
        self._answered: Counter[tuple[str, int]] = Counter()
        self._rejected: Counter[str] = Counter()
        self._request_seconds: list[tuple[float, str]] = []
        self._decode_seconds: list[float] = []


class DistantModel:
    """A model that another process runs.

    Args:
        number: by which the other process knows it.
        version: number of its folder.
        metadata: of the file that runs.
        link: to that process.
        waiting: the requests that wait for it.
    """

    def __init__(self, number: int, version: int, metadata: ModelMetadata, link: Link, waiting: "Waiting") -> None:
        self.version = version
        self.metadata = metadata
        self.batcher = DistantBatcher(number, link, waiting)
        self._number = number
        self._link = link
        self._leases = 0
        self._is_retired = False

    def __enter__(self) -> Self:
        self._leases += 1
        return self

    def __exit__(self, *exception: object) -> None:
        self._leases -= 1
        self._release()

    def retire(self) -> None:
        """Say so as soon as no request holds it; no other will."""
        self._is_retired = True
        self._release()

    def _release(self) -> None:
        if self._is_retired and not self._leases:
            self._link.send(Released(self._number))


class Waiting:
    """The requests whose answer is to come from the other process, by number.

    What is too late is that process's to say, for it knows what runs already. Where it shows no sign of life, it is
    said here; and those who have no deadline are told so.

    Args:
        link: to that process.
        ledger: where it shows that it lives.
    """

    def __init__(self, link: Link, ledger: Ledger) -> None:
        self._link = link
        self._ledger = ledger
        self._outcomes: dict[int, tuple[Outcome | asyncio.Future[Called], float]] = {}
        self._last = 0
        self._over: Callable[[], ServiceError] | None = None
        self._looks = Recurring(self._fail_late)

    def begin(self, outcome: "Outcome | asyncio.Future[Called]", deadline: float = math.inf) -> int:
        """Return the number of a new request, whose answer will end `outcome`.

        Raises:
            NotReady: the other process has been silent for long, and there is no deadline.
            Overloaded: it does not read what is sent; more would only fill the memory of this one.
            ServiceError: no answers come any more, see `fail_all`.
        """
        if self._over is not None:
            raise self._over()
        if deadline == math.inf and self._ledger.silence() > PATIENCE_SECONDS:
            raise NotReady(SILENT)
        if self._link.is_full:
            raise Overloaded()
        self._last += 1
        self._outcomes[self._last] = (outcome, deadline)
        self._looks.wake()
        return self._last

    def give_up(self, number: int) -> bool:
        """Wait no more; tell whether the answer had not come."""
        return self._outcomes.pop(number, None) is not None

    def end(self, number: int, result: Any) -> None:
        """Give an answer, if somebody waits for it."""
        if (outcome := self._taken(number)) is not None:
            end_safely(outcome.set_result, result)

    def fail(self, number: int, error: ServiceError) -> None:
        """Give an error, if somebody waits."""
        if (outcome := self._taken(number)) is not None:
            end_safely(outcome.set_exception, error)

    def fail_all(self, error: Callable[[], ServiceError]) -> None:
        """Give an error each to all that wait and all that come: no answer will."""
        self._over = error
        for number in list(self._outcomes):
            self.fail(number, error())

    def _fail_late(self) -> bool:
        """Answer what is too late while the other process is silent; return whether anything waits."""
        if (silence := self._ledger.silence()) > SILENCE_SECONDS:
            now = asyncio.get_running_loop().time()
            for number, (_, deadline) in list(self._outcomes.items()):
                if deadline <= now:
                    # Not cancelled there: when that process goes on, it finds them late too, and counts them as that.
                    self.fail(number, DeadlineExceeded())
                elif deadline == math.inf and silence > PATIENCE_SECONDS:
                    self.fail(number, NotReady(SILENT))
        return bool(self._outcomes)

    def _taken(self, number: int) -> "Outcome | asyncio.Future[Called] | None":
        outcome, _ = self._outcomes.pop(number, (None, 0.0))
        return None if outcome is None or outcome.done() else outcome


class DistantBatcher:
    """The way to the batcher of one model."""

    def __init__(self, model: int, link: Link, waiting: Waiting) -> None:
        self._model = model
        self._link = link
        self._waiting = waiting

    async def submit_many(self, images: Sequence[Image], *, deadline: float | None = None) -> list[Prediction]:
        """Classify the pictures of one request; as `DynamicBatcher.submit_many`."""
        future: asyncio.Future[list[Prediction]] = asyncio.get_running_loop().create_future()
        number = self.post([image.data for image in images], future, math.inf if deadline is None else deadline)
        try:
            return await future
        finally:
            del future  # an error's traceback holds this frame, and the future the error: a cycle for the collector
            self.withdraw(number)

    def post(self, images: Sequence[Pixels], outcome: Outcome, deadline: float) -> int:
        """Do the same for somebody who does not await it."""
        number = self._waiting.begin(outcome, deadline)
        self._link.send(Submit(number, self._model, deadline, cast("list[bytes]", images)))
        return number

    def withdraw(self, number: int) -> None:
        """Have what was posted not run, unless its answer is here."""
        if self._waiting.give_up(number):
            self._link.send(Cancel(number))
