"""What the process that runs the model and those that speak HTTP say to each other."""

import msgspec

from service.front import Status

Headers = list[tuple[bytes, bytes]]


class Message(msgspec.Struct, array_like=True, tag_field="type"):
    """Base of all."""


# From a process that speaks HTTP


class Submit(Message, tag=0):
    """Pictures of one request.

    Attributes:
        number: of the request; the answer carries it.
        model: that the request holds, see `State`.
        deadline: on the clock of `loop.time()`, which all processes of a machine share.
        pictures: the memory of uint8 [H, W, 3], each. (A memoryview may be sent too.)
    """

    number: int
    model: int
    deadline: float
    pictures: list[bytes]


class Cancel(Message, tag=1):
    """Nobody waits for these pictures any more."""

    number: int


class Call(Message, tag=2):
    """A request for any other route than /predict, without its body: none of them takes one."""

    number: int
    request_id: str
    method: str
    path: str
    raw_path: bytes
    query: bytes
    headers: Headers


class Counts(Message, tag=3):
    """What happened to requests since the message before.

    Attributes:
        answered: (route, status, how many).
        rejected: (error code, how many).
        request_seconds: one of each request to /predict, and its id.
        decode_seconds: one of each request that was decoded.
    """

    answered: list[tuple[str, int, int]]
    rejected: list[tuple[str, int]]
    request_seconds: list[tuple[float, str]]
    decode_seconds: list[float]


class Alive(Message, tag=4):
    """The answer to `Ask`; the counts that belong to it have been sent before."""

    number: int


class Listening(Message, tag=5):
    """It accepts connections."""


class Released(Message, tag=6):
    """No request holds this model any more, nor will one."""

    model: int


# From the process that runs the model


class State(Message, tag=10):
    """What is true from now on.

    Attributes:
        status: of the service.
        failure: why it can't go on; "".
        model: a number for the live one, never used before on this link: a version's folder may be filled anew; 0 until
            there is one.
        version: number of its folder.
        metadata: of its file, as JSON; only with the first message that names this model.
        leaving: whether the service was told to stop.
        drain_seconds: left to finish what was accepted; only where the status is "draining".
    """

    status: Status
    failure: str
    model: int
    version: int
    metadata: bytes
    leaving: bool
    drain_seconds: float


class Answered(Message, tag=11):
    """The answers to some requests, of models with the same number of classes.

    Attributes:
        numbers: of the requests.
        pictures: how many each has.
        queue_seconds: of each picture.
        runs: (how many pictures in a row come from one batch, its seconds of inference, its size).
        logits: float32 [pictures, C], in the machine's byte order, in pieces.
    """

    numbers: list[int] = []
    pictures: list[int] = []
    queue_seconds: list[float] = []
    runs: list[tuple[int, float, int]] = []
    logits: list[bytes] = []


class Refused(Message, tag=12):
    """The answer to a request that ended in an error: the class, see `service.errors`, and its words."""

    number: int
    error: str
    message: str
    retry_after: float


class Called(Message, tag=13):
    """The answer to a `Call`."""

    number: int
    status: int
    headers: Headers
    body: bytes


class Ask(Message, tag=14):
    """Are you there? Send what you have counted, and then `Alive`."""

    number: int


FromFront = Submit | Cancel | Call | Counts | Alive | Listening | Released
FromEngine = State | Answered | Refused | Called | Ask
