"""The hand-written JSON against the pydantic model, and the numbers in it against a plain softmax."""

import numpy as np
import pytest

from service.api.prediction_writer import PredictionWriter
from service.api.schemas import PredictResponse
from service.batching.logits import MANY_CLASSES, BatchLogits
from service.batching.queue import Prediction
from service.errors import InferenceFailed
from tests.fakes import tiny_metadata

LABELS = tuple(f'class {index}% %d %% "quoted" \u00e4' for index in range(100))
METADATA = tiny_metadata(labels=LABELS)


def predictions_of(logits: np.ndarray) -> list[Prediction]:
    outputs = BatchLogits(logits)
    return [Prediction(outputs, row, 0.0, 0.0, len(logits)) for row in range(len(logits))]


def write(logits: np.ndarray, filenames: list[str | None], top_k: int) -> PredictResponse:
    content = PredictionWriter(METADATA, 7).write(predictions_of(logits), filenames, top_k)
    return PredictResponse.model_validate_json(content)


def test_the_answer_is_the_softmax_in_the_documented_shape() -> None:
    logits = np.random.default_rng(0).normal(0, 3, (6, 100)).astype(np.float32)
    names = ["a.png", None, 'c"\n\u2028.png', "\u00e4", "", "x" * 300]
    answer = write(logits, names, 5)
    assert (answer.model, answer.version) == ("tiny", 7)
    assert [image.filename for image in answer.predictions] == names
    exact = np.exp(logits.astype(np.float64))
    exact /= exact.sum(axis=1, keepdims=True)
    for row, image in zip(exact, answer.predictions, strict=True):
        order = np.argsort(-row)[:5]
        assert [entry.index for entry in image.top] == order.tolist()
        assert [entry.label for entry in image.top] == [LABELS[index] for index in order]
        np.testing.assert_allclose([entry.probability for entry in image.top], row[order], atol=1e-6)


@pytest.mark.parametrize("top_k", [1, 2, 99, 100])
def test_as_many_classes_as_were_asked_for(top_k: int) -> None:
    logits = np.random.default_rng(1).normal(size=(2, 100)).astype(np.float32)
    answer = write(logits, [None, None], top_k)
    assert [len(image.top) for image in answer.predictions] == [top_k, top_k]
    assert sorted({entry.index for entry in answer.predictions[0].top}) == sorted(np.argsort(-logits[0])[:top_k])


def test_of_equal_classes_the_lower_index_comes_first() -> None:
    answer = write(np.zeros((1, 100), np.float32), [None], 4)
    assert [entry.index for entry in answer.predictions[0].top] == [0, 1, 2, 3]


@pytest.mark.parametrize("classes", [MANY_CLASSES, MANY_CLASSES + 1])
@pytest.mark.parametrize("k", [1, 7, 500])
def test_many_classes_are_ranked_alike(classes: int, k: int) -> None:
    logits = np.random.default_rng(2).normal(0, 2, (4, classes)).astype(np.float32).round(1)  # with ties
    outputs = BatchLogits(logits)
    exact = np.exp(logits.astype(np.float64))
    exact /= exact.sum(axis=1, keepdims=True)
    for row in (2, 0, 3, 1):
        found, probabilities = outputs.top(row, k)
        order = np.argsort(-logits[row], kind="stable")[:k]
        assert found == order.tolist()
        np.testing.assert_allclose(probabilities, exact[row][order], rtol=1e-5)


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("k", [1, MANY_CLASSES + 1])
@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
def test_of_many_classes_what_is_no_number_is_no_answer(value: float, k: int) -> None:
    logits = np.zeros((1, MANY_CLASSES + 1), np.float32)
    logits[0, 3:] = value
    with pytest.raises(InferenceFailed, match="not a number"):
        BatchLogits(logits).top(0, k)


def test_large_logits_do_not_overflow() -> None:
    logits = np.zeros((1, 100), np.float32)
    logits[0, 42] = 3e38
    top = write(logits, [None], 2).predictions[0].top
    assert (top[0].index, top[0].probability, top[1].probability) == (42, 1.0, 0.0)


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
def test_what_is_no_number_is_no_answer(value: float) -> None:
    logits = np.zeros((2, 100), np.float32)
    logits[1, 3] = value
    with pytest.raises(InferenceFailed, match="not a number"):
        write(logits, [None, None], 1)
    other = PredictionWriter(METADATA, 7).write(
        predictions_of(logits)[:1], [None], 1
    )  # another request of the same batch
    assert PredictResponse.model_validate_json(other).predictions[0].top[0].index == 0
