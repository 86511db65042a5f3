"""`python -m benchmarks.gpu_report` on the CPU: what it finds, and what is left when something ends it."""

import csv
import os
import signal
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path

import pytest

from benchmarks.common import ROOT, BenchmarkError
from benchmarks.gpu_report import forms
from benchmarks.gpu_report import parts as parts_module
from benchmarks.gpu_report.__main__ import run_parts
from benchmarks.gpu_report.forms import BOUND, GRAPHS
from benchmarks.gpu_report.page import Report
from benchmarks.gpu_report.parts import SHIPPED, Part, Run, all_parts, first_answer, gpu_tests, http, prepare, reason
from benchmarks.tiny_model import make_tiny_model
from service.engine.metadata import MODEL_FILES
from service.engine.onnx_engine import OnnxEngine
from service.engine.session import EngineError
from service.repository.folder import GOLDEN_FILE, load_golden, save_golden
from service.repository.golden_check import check_golden
from tests.benchmarks.test_summary import load_of

FLAGS = ("--device", "cpu", "--presets", "--batches", "1", "2", "--http-seconds", "1")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("models") / "tiny").folder


@pytest.fixture
def run(tmp_path: Path, tiny: Path) -> Run:
    return Run(Report(tmp_path / "out", {"machine": "a test"}), "cpu", tiny, [1, 2], tmp_path / "models")


def command(tiny: Path, out: Path, *flags: str) -> list[str]:
    return [sys.executable, "-m", "benchmarks.gpu_report", *FLAGS, "--model", str(tiny), "--out", str(out), *flags]


def rows(folder: Path) -> list[dict[str, str]]:
    lines = (folder / "report.csv").read_text().splitlines()
    return list(csv.DictReader(line for line in lines if not line.startswith("#")))


@pytest.mark.timeout(900)
def test_the_command_on_a_cpu(tiny: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    flags = ("--minutes", "8", "--parts", "golden", "engine", "torch", "http", "swap")
    done = subprocess.run(command(tiny, out, *flags), cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = rows(out)
    golden = [row["note"] for row in found if row["part"] == "golden"]
    assert len(golden) == 2
    assert all(note.startswith("passed: largest difference") for note in golden)
    engine = [row for row in found if row["part"] == "engine" and row["runs"]]
    assert [(row["precision"], row["form"], row["batch"]) for row in engine] == [
        (precision, "plain", batch) for precision in ("float32", "float16") for batch in "12"
    ]
    assert all(float(row["images_per_s"]) > 0 for row in engine)
    served = [row for row in found if row["part"] in ("http", "swap")]
    assert [row["part"] for row in served] == ["http", "http", "swap", "swap"]
    for row in served:
        assert row["errors"] == "none", row
        if row is not served[2]:  # before the swap there is half a second
            assert float(row["p99_ms"]) >= float(row["p50_ms"]) > 0
    assert "to 0.5 s after its first answer" in served[-1]["note"]
    # The tiny model has no checkpoint, so that torch has nothing to run.
    assert next(row["note"] for row in found if row["part"] == "torch").startswith("FileNotFoundError")
    page = (out / "report.md").read_text()
    assert "# Report of a CPU run" in page
    assert "1 of them failed or ran out of time." in page
    assert "| batch | plain, float32 | plain, float16 |" in page


def test_a_stop_keeps_what_there_is(tiny: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with subprocess.Popen(
        command(tiny, out, "--parts", "golden", "engine", "http"),
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        while not process.stdout.readline().startswith("part engine"):
            assert process.poll() is None
        before = (out / "report.md").read_text()
        process.send_signal(signal.SIGINT)
        _, error = process.communicate(timeout=240)
    assert process.returncode == 130
    assert "Traceback" not in error
    assert "Not complete" in before  # what a kill would have left
    assert "Stopped after" in (out / "report.md").read_text()
    assert {"golden", "engine"} <= {row["part"] for row in rows(out)}


def test_a_part_that_raises_or_takes_too_long_gets_a_row_and_the_others_run(run: Run) -> None:
    def broken(run: Run, name: str) -> None:
        raise BenchmarkError("no such thing")

    def endless(run: Run, name: str) -> None:
        try:
            while True:
                time.sleep(0.01)
        except Exception:  # as a library might
            pytest.fail("the limit was caught")

    def fine(run: Run, name: str) -> None:
        run.report.add("fine", model=name, note="done")

    parts = [Part("broken", "m", 0, broken), Part("endless", "m", 1, endless), Part("fine", "m", 200, fine)]
    assert run_parts(run, parts, 20) == 2
    notes = {row["part"]: str(row["note"]) for row in run.report.rows}
    assert notes["broken"] == "no such thing"
    assert notes["endless"].startswith("stopped: its ")
    assert notes["fine"] == "done"
    assert [row["part"] for row in rows(run.report.folder)] == ["broken", "endless", "fine"]


def test_a_form_without_its_graphs_is_not_measured_under_their_name(
    tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As beside torch's CUDA build, whose cuDNN is older than graphs want."""
    opened = []

    def warm_up(engine: OnnxEngine) -> None:
        opened.append(engine)
        engine.without_graphs = "cuDNN must be 9.28.0 or newer"

    monkeypatch.setattr(OnnxEngine, "warm_up", warm_up)
    file = tiny / "1" / "model.onnx"
    forms.open_form(BOUND, file, "cpu", [1])
    with pytest.raises(EngineError, match=r"^no CUDA graphs: cuDNN must be 9\.28\.0 or newer$"):
        forms.open_form(GRAPHS, file, "cpu", [1])
    assert [engine._runner is None for engine in opened] == [False, True]


def test_float16_may_differ_by_what_all_golden_images_differ(tmp_path: Path) -> None:
    """The first four, of which a batch is made, are black: float16 tells these exactly."""
    place = make_tiny_model(tmp_path / "m")
    golden = load_golden(place.path / GOLDEN_FILE)
    golden.images[:4], golden.logits[:4] = 0, 0
    golden.logits[4:] += 0.05  # as a deeper model's float16 would differ
    save_golden(place.path / GOLDEN_FILE, golden)
    forms.add_float16(place, "cpu")
    with closing(OnnxEngine(place.path / MODEL_FILES["float16"], provider="cpu", max_batch_size=8)) as engine:
        engine.warm_up()
        assert check_golden(engine, golden).max_abs_difference == pytest.approx(0.05, abs=0.02)


@pytest.mark.parametrize(
    ("message", "said"),
    [("it broke:\nTraceback\nno memory\n", "it broke: no memory"), ("one line", "one line"), ("two\nlines", "two")],
)
def test_a_log_s_last_line_is_the_reason(message: str, said: str) -> None:
    assert reason(BenchmarkError(message)) == said


def test_without_fastapi_or_pytest_the_rows_say_so(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    for missing in ("fastapi", "pytest"):
        monkeypatch.setitem(sys.modules, missing, None)
    parts = [Part("prepare", SHIPPED, 1, prepare), Part("tests", "", 1, gpu_tests), Part("http", SHIPPED, 1, http)]
    assert run_parts(run, parts, 600) == 2
    assert [row["note"] for row in run.report.rows] == [
        "pytest is not installed",
        "fastapi is not installed, so there is no service to load",
    ]


def test_the_command_itself_imports_neither_torch_nor_fastapi() -> None:
    code = "import sys; sys.modules |= dict.fromkeys(('fastapi', 'torch', 'onnx', 'pytest')); import {}.__main__"
    done = subprocess.run([sys.executable, "-c", code.format("benchmarks.gpu_report")], cwd=ROOT, check=False)
    assert done.returncode == 0


def test_without_a_gpu_the_command_says_what_runs_here(tmp_path: Path, tiny: Path) -> None:
    flags = [one if one != "cpu" else "cuda" for one in command(tiny, tmp_path / "out")]
    environment = os.environ | {"PATH": str(tmp_path)}
    done = subprocess.run(flags, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr == "error: nvidia-smi names no GPU here; --device cpu runs the same without one\n"


def test_the_gpu_tests_that_fail_are_named(run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "test_other.py").write_text("raise SystemExit('not to be collected')")
    (tmp_path / "tests" / "test_some.py").write_text(
        "import pytest\npytestmark = pytest.mark.gpu\ndef test_bad(): assert False\ndef test_good(): pass\n"
    )
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers = gpu: x\n")
    monkeypatch.setattr(parts_module, "ROOT", tmp_path)
    gpu_tests(run, "")
    failed, said = (str(row["note"]) for row in run.report.rows)
    assert failed.startswith("FAILED tests/test_some.py::test_bad")
    assert said.startswith("pytest -m gpu: 1 failed, 1 passed")


def test_the_page_has_a_column_a_form_and_marks_the_fastest(tmp_path: Path) -> None:
    report = Report(tmp_path, {"gpu": "Some GPU"})
    for form, batch, ms in (("plain", 1, 2.0), ("plain", 8, 4.0), ("CUDA graphs", 8, 2.0)):
        values = {"runs": 3, "ms_median": ms, "ms_best": ms, "images_per_s": batch / ms * 1e3}
        report.add("engine", model="m", precision="float32", form=form, batch=batch, **values)
    report.add("engine", model="m", form="io-bound", note="a | b\nc")
    page = (tmp_path / "report.md").read_text()
    assert "# Report of Some GPU" in page
    assert "| batch | plain, float32 | CUDA graphs, float32 |\n|---|---|---|\n| 1 | 500 (2) |  |\n" in page
    assert "| 8 | 2000 (4) | **4000 (2)** |" in page
    assert "| engine | m |  | io-bound | a \\| b c |" in page
    best = report.best("m", "float32")
    assert best is not None
    assert (best["form"], best["batch"]) == ("CUDA graphs", 8)
    assert report.best("m", "float16") is None
    with pytest.raises(KeyError, match="colour"):
        report.add("engine", colour="red")


def test_every_part_of_a_model_comes_after_its_preparation() -> None:
    parts = [(part.name, part.model) for part in all_parts(["photo"])]
    for name, model in parts:
        if model:
            assert parts.index(("prepare", model)) <= parts.index((name, model))


def test_the_first_answer_of_a_version() -> None:
    load = load_of((0, 0, 1, 200, ""), (0, 0, 3, 200, ""), (0, 0, 2, 200, ""), (0, 0, 1.5, 503, ""))
    load.records.body[:] = [b'{"version":1}', b'{"version":2}', b'{"version":2}', b"{}"]
    assert first_answer(load, 2) == 2
    assert first_answer(load, 3) is None
