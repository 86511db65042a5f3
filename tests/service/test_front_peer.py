"""One process that speaks HTTP, seen from the one that runs the model."""

from typing import cast

import numpy as np
from starlette.types import ASGIApp

from service.fair_queue import Prediction
from service.front_peer import FrontProcess, House
from service.ledger import Ledger
from service.link import Link
from service.messages import Answered
from service.outputs import Outputs
from service.state import Service
from service.translation import unpack
from tests.service.test_distant import Heard


def test_answers_of_models_with_different_numbers_of_classes_go_into_different_messages() -> None:
    """Two models answer in one turn while one takes the other's place."""
    front = FrontProcess(0, cast("House", None), cast("Service", None), cast("ASGIApp", None), Ledger(1), [])
    link = Heard()
    front._link = cast("Link", link)
    expected = {}
    for number, classes in enumerate([5, 5, 3, 5]):
        logits = np.arange(2 * classes, dtype=np.float32).reshape(2, classes) + number
        expected[number] = logits.tolist()
        outputs = Outputs(logits)
        front.answer(number, [Prediction(outputs, row, 0.1, 0.2, 2) for row in range(2)])
    front._collect()
    arrived = {}
    for message in link.messages:
        assert isinstance(message, Answered)
        for number, predictions in unpack(message):
            arrived[number] = [prediction.logits.tolist() for prediction in predictions]
    assert arrived == expected
    assert [message.numbers for message in link.messages if isinstance(message, Answered)] == [[0, 1], [2], [3]]
