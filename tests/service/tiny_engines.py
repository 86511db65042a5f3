"""Engines on the tiny model, one of them with little memory."""

from collections.abc import Sequence
from pathlib import Path

from service.engine.metadata import MODEL_FILES
from service.engine.onnx_engine import OnnxEngine
from service.engine.runners import HostRunner
from service.engine.session import ProviderChoice
from tests.fakes import Images, Logits, tiny_logits


def open_tiny(folder: Path, *, provider: ProviderChoice = "cpu", max_batch_size: int = 8) -> OnnxEngine:
    return OnnxEngine(
        folder / MODEL_FILES["float32"], provider=provider, max_batch_size=max_batch_size, intra_op_threads=1
    )


class LimitedSession:
    """A session that has memory for `limit` images, and an answer that can be recomputed."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.sizes: list[int] = []

    def run(self, outputs: Sequence[str], feeds: dict[str, Images], options: object = None) -> list[Logits]:
        images = feeds["images"]
        self.sizes.append(len(images))
        if len(images) > self.limit:
            raise RuntimeError("[ONNXRuntimeError] : 6 : bfc_arena.cc Failed to allocate memory for requested buffer")
        return [tiny_logits(images, 1)]


def limited_engine(folder: Path, limit: int) -> tuple[OnnxEngine, LimitedSession]:
    engine, session = open_tiny(folder), LimitedSession(limit)
    engine._runner = HostRunner(session, engine.max_batch_size)
    return engine, session
