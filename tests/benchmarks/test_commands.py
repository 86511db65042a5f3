"""The commands themselves, shortly, against a started service with a tiny model. Their figures are not tested."""

import argparse
import csv
import re
import signal
import subprocess
import sys
from pathlib import Path
from statistics import median

import numpy as np
import pytest
import torch

from benchmarks.common import ROOT, BenchmarkError
from benchmarks.engine import Cell
from benchmarks.load import make_plans, parse_headers, parse_url
from benchmarks.overhead import Measured, verdict
from benchmarks.processes import Load
from benchmarks.summary import Summary, medians, summarize
from benchmarks.tiny_model import make_tiny_model
from service.engine.onnx_engine import OnnxEngine
from service.repository.folder import load_golden
from service.repository.golden_check import check_golden
from tests.benchmarks.test_summary import load_of
from training.precision import choose_precision


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("models") / "tiny").folder


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", *arguments], cwd=ROOT, capture_output=True, text=True, check=False, timeout=120
    )


def rows(path: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(line for line in path.read_text().splitlines() if not line.startswith("#")))


def test_the_tiny_model_keeps_the_contract(tiny: Path) -> None:
    engine = OnnxEngine(tiny / "1" / "model.onnx", provider="cpu", intra_op_threads=1)
    assert check_golden(engine, load_golden(tiny / "1" / "golden.npz")).labels_differ == 0


def test_engine(tiny: Path, tmp_path: Path) -> None:
    out = tmp_path / "engine.csv"
    done = run(
        *("benchmarks.engine", str(tiny), str(tiny / "1"), "--batches", "1", "4", "--seconds", "0.02"),
        *("--rounds", "2", "--threads", "1", "--gflop", "0.0006", "--csv", str(out)),
    )
    assert done.returncode == 0, done.stderr
    assert [(row["model"], row["batch"]) for row in rows(out)] == [("tiny/1/model.onnx", n) for n in "1144"]
    assert all(float(row["fraction_of_matmul"]) > 0 for row in rows(out))
    assert "matrix product" in done.stdout


def test_closed_loop(tiny: Path, tmp_path: Path) -> None:
    out = tmp_path / "load.csv"
    options = ("--setting", "intra_op_threads=1", "--seconds", "0.3", "--warmup", "0.1", "--csv", str(out))
    done = run("benchmarks.load", "--model", str(tiny), "--concurrency", "1", "8", *options)
    assert done.returncode == 0, done.stderr
    assert [row["load"] for row in rows(out)] == ["closed loop, concurrency 1", "closed loop, concurrency 8"]
    for row in rows(out):
        assert row["requests"] == row["answered"] != "0"
        assert row["errors"] == ""
        assert float(row["latency_p50_ms"]) > 0
        assert row["inference_mean_ms"] != ""


def test_open_loop_and_errors_by_code(tiny: Path, tmp_path: Path) -> None:
    out = tmp_path / "load.csv"
    options = ("--seconds", "0.2", "--warmup", "0", "--rate", "20", "--arrivals", "even", "--csv", str(out))
    done = run("benchmarks.load", "--model", str(tiny), "--body", "json", "--path", "/predict?top_k=0", *options)
    assert done.returncode == 0, done.stderr
    assert rows(out)[0]["errors"] == "400 invalid_top_k: 4"
    assert rows(out)[0]["images_per_second"] == "0.0"


def test_v2(tmp_path: Path) -> None:
    out = tmp_path / "v2.csv"
    done = run("benchmarks.v2", "--seconds", "0.2", "--warmup", "0.1", "--rounds", "1", "--csv", str(out))
    assert done.returncode == 0, done.stderr
    assert len(rows(out)) == 4
    assert all(row["errors"] == "0" and float(row["images_per_s"]) > 0 for row in rows(out))


def test_request_path(tmp_path: Path) -> None:
    out = tmp_path / "path.csv"
    few = ("--seconds", "0.2", "--warmup", "0.1", "--rounds", "2", "--connections", "4")
    done = run("benchmarks.request_path", *few, "--before", str(ROOT), "--csv", str(out))
    assert done.returncode == 0, done.stderr
    kinds = ["service, raw body", "service, head and body apart", "service, multipart"]
    measured = [*kinds, "floor, raw body", *(f"before: {kind}" for kind in kinds)]
    assert [row["request"] for row in rows(out)] == measured
    assert all(row["errors"] == "0" and float(row["images_per_s"]) > 0 for row in rows(out))
    # A round whose CPU time is below a clock tick has no ratio.
    assert re.search(
        r"^service, .*: \d+\.\d\d\d of the CPU time before, quartiles .*, n = 2$", done.stdout, re.MULTILINE
    )


def test_request_path_beside_no_checkout(tmp_path: Path) -> None:
    done = run("benchmarks.request_path", "--before", str(tmp_path))
    assert done.returncode != 0
    assert f"--before {tmp_path}: is no checkout of this project; it has no service/" in done.stderr


def test_decoding(tmp_path: Path) -> None:
    out = tmp_path / "decoding.csv"
    done = run("benchmarks.decoding", "--sizes", "32", "--seconds", "0.05", "--rounds", "2", "--csv", str(out))
    assert done.returncode == 0, done.stderr
    assert [row["way"] for row in rows(out)] == ["thread", "process"]


def test_explaining(tiny: Path, tmp_path: Path) -> None:
    out = tmp_path / "explaining.csv"
    options = ("--seconds", "0.5", "--rounds", "1", "--rate", "10", "--csv", str(out))
    done = run("benchmarks.explaining", str(tiny), *options)
    assert done.returncode == 0, done.stderr
    alone, beside = rows(out)
    assert alone["errors"] == beside["errors"] == "0"
    assert float(alone["explanations_per_s"]) == 0 < float(beside["explanations_per_s"])
    assert "p99 longer by" in done.stdout


def test_training_speed(tmp_path: Path) -> None:
    out = tmp_path / "training.csv"
    flags = ("compact", "--seconds", "0.1", "--batch-size", "4", "--threads", "1", "--device", "cpu", "--csv", str(out))
    done = run("benchmarks.training_speed", *flags)
    assert done.returncode == 0, done.stderr
    (row,) = rows(out)
    assert (row["preset"], row["processes"], row["threads"], row["batch"]) == ("compact", "1", "1", "4")
    assert int(row["steps"]) >= 3
    assert row["precision"] == choose_precision("auto", torch.device("cpu"))
    assert 0 < float(row["images/s, median"]) <= float(row["images/s, best"])
    assert 0 < float(row["fraction of it, best"]) < 1


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 128 + signal.SIGTERM)])
def test_a_signal_ends_training_speed_between_two_steps(number: signal.Signals, status: int) -> None:
    flags = ("compact", "--seconds", "3000", "--batch-size", "4", "--threads", "1", "--device", "cpu")
    command = [sys.executable, "-m", "benchmarks.training_speed", *flags]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        while not process.stdout.readline().startswith("torch "):
            assert process.poll() is None
        process.send_signal(number)
        _, error = process.communicate(timeout=240)
    assert process.returncode == status
    assert "Traceback" not in error


def test_training_speed_where_there_is_no_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    done = run("benchmarks.training_speed", "compact", "--device", "cuda")
    assert done.returncode == 1
    assert done.stderr.startswith("error: --device cuda: torch sees no CUDA device")


def test_startup(tiny: Path, tmp_path: Path) -> None:
    out = tmp_path / "startup.csv"
    done = run("benchmarks.startup", str(tiny), "--runs", "1", "--requests", "20", "--csv", str(out))
    assert done.returncode == 0, done.stderr
    assert [row["run"] for row in rows(out)] == ["1", "median"]
    assert float(rows(out)[0]["ready_s"]) > 0
    assert rows(out)[0]["answered"] == "20.0"


def test_a_wrong_setting_is_the_services_own_sentence(tiny: Path) -> None:
    done = run("benchmarks.startup", str(tiny), "--setting", "max_bach_size=3")
    assert done.returncode == 1
    assert "PERCEIVER_MAX_BACH_SIZE" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_wrong_model_is_a_sentence(tmp_path: Path) -> None:
    done = run("benchmarks.load", "--model", str(tmp_path), "--rate", "1")
    assert done.returncode == 1
    assert done.stderr.startswith(f"error: {tmp_path}: must be a model folder")


def test_overhead(tiny: Path, tmp_path: Path) -> None:
    out = tmp_path / "overhead.csv"
    options = ("--seconds", "0.3", "--warmup", "0.1", "--rounds", "1", "--batches", "2", "--concurrency", "2")
    done = run("benchmarks.overhead", str(tiny), *options, "--provider", "cpu", "--threads", "1", "--csv", str(out))
    assert done.returncode == 0, done.stderr
    (row,) = rows(out)
    assert row["errors"] == "0"
    assert row["engine_best_batch"] in ("1", "2")
    assert float(row["http_images_per_s"]) > 0


def test_overhead_figures() -> None:
    def of(images_per_second: float, p50: float) -> Summary:
        empty = summarize(load_of())
        return Summary(**{**vars(empty), "images_per_second": images_per_second, "latency_ms": {"p50": p50}})

    measured = Measured(
        engine={1: Cell([0.010]), 8: Cell([0.04, 0.02, 0.03]), 32: Cell([0.16])},
        many=[of(200.0, 1), of(250.0, 1), of(240.0, 1)],
        single=[of(1.0, 12.0)],
        decode=[0.001, 0.0005, 0.002],
    )
    figures = verdict(measured, 32)
    assert (figures["engine_best_batch"], figures["engine_images_per_s"]) == (8, pytest.approx(8 / 0.03))
    assert figures["throughput_ratio"] == pytest.approx(240 / (8 / 0.03))
    assert figures["latency_difference_ms"] == pytest.approx(12 - 10 - 1)
    assert figures["errors"] == 0


def test_request_path_rows_are_medians_over_rounds() -> None:
    loads: list[Load] = [load_of((11, 11, 12, 200, ""), cpu=cpu) for cpu in (0.1, 0.5, 0.2)]
    row = medians([summarize(load) for load in loads])
    assert row["server_cpu_ms"] == pytest.approx(median([100, 500, 200]))
    assert (row["server_cpu_ms_min"], row["server_cpu_ms_max"]) == pytest.approx((100, 500))
    assert row["images_per_s"] == pytest.approx(0.1)


def test_plans_of_the_command_line() -> None:
    args = argparse.Namespace(
        warmup=1.0, seconds=3.0, connections=256, timeout=30.0, rate=100.0, arrivals="even", seed=0, concurrency=None
    )
    ((title, plan),) = make_plans(args, "h", 1, [b""]).items()
    assert title == "open loop, 100 requests/s, even"
    assert plan.seconds == 4
    assert np.array_equal(plan.arrivals, np.arange(400) / 100)
    args.rate, args.concurrency = None, [1, 16]
    plans = make_plans(args, "h", 1, [b""])
    assert [(plan.connections, plan.arrivals) for plan in plans.values()] == [(1, None), (16, None)]


def test_addresses_and_headers_are_read() -> None:
    assert parse_url("http://example.org:81/") == ("example.org", 81)
    assert parse_url("http://127.0.0.1") == ("127.0.0.1", 80)
    assert parse_headers(["X-A: b:c", "D:e"]) == {"X-A": "b:c", "D": "e"}
    for url in ("https://example.org", "example.org:80", "http://"):
        with pytest.raises(BenchmarkError, match="must have the form http://HOST:PORT"):
            parse_url(url)
    with pytest.raises(BenchmarkError, match="NAME:VALUE"):
        parse_headers(["nonsense"])
