"""What a package loads at run time, in clean interpreters. import-linter (`make lint`) checks the import statements."""

import ast
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TRAINING_ONLY = {"torch", "onnx", "onnxscript", "pytorch_optimizer", "safetensors", "matplotlib", "tensorboard"}
TESTING_ONLY = {"pytest", "hypothesis", "aiohttp", "tests", "benchmarks"}
WEB = {"fastapi", "starlette", "uvicorn", "prometheus_client", "pydantic_settings", "PIL", "python_multipart"}


def loaded_after(code: str) -> set[str]:
    """All modules that are loaded after running `code`."""
    report = f"{code}\nimport sys\nprint('\\n'.join(sys.modules))"
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", report],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return set(done.stdout.split())


def modules(package: str) -> list[str]:
    """Every module of a package of this repository, `__main__` excepted."""
    folder = ROOT / package
    if not folder.is_dir():
        return []
    names = [info.name for info in pkgutil.walk_packages([str(folder)], f"{package}.")]
    return [package, *(name for name in names if not name.endswith("__main__"))]


def imports_all(names: list[str]) -> str:
    return "\n".join(f"import {name}" for name in names)


def packages(loaded: set[str]) -> set[str]:
    return {name.partition(".")[0] for name in loaded}


def imported_by(path: Path) -> set[str]:
    """The modules that a file names in its import statements, wherever they stand."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def files(package: str) -> list[Path]:
    return sorted((ROOT / package).rglob("*.py"))


def test_serving_loads_no_torch_and_nothing_of_training() -> None:
    loaded = packages(loaded_after("import service.api.app, service.server.server, service.__main__"))
    assert loaded >= {"service", "fastapi", "onnxruntime"}
    assert not loaded & (TRAINING_ONLY | TESTING_ONLY | {"training", "export"})


def test_no_module_of_the_service_loads_torch() -> None:
    names = modules("service")
    assert len(names) > 15
    assert not packages(loaded_after(imports_all(names))) & (TRAINING_ONLY | TESTING_ONLY | {"training", "export"})


@pytest.mark.parametrize("module", ["service.engine.metadata", "service.engine.onnx_engine"])
def test_what_export_shares_needs_no_web_framework(module: str) -> None:
    assert not packages(loaded_after(f"import {module}")) & (WEB | TRAINING_ONLY)


def test_the_artifact_contract_needs_no_engine() -> None:
    assert "onnxruntime" not in packages(loaded_after("import service.engine.metadata"))


def test_errors_need_the_standard_library_alone() -> None:
    assert not packages(loaded_after("import service.errors")) & (WEB | TRAINING_ONLY | {"numpy", "pydantic"})


def test_help_and_typing_errors_wait_for_no_engine() -> None:
    assert not packages(loaded_after("import service.__main__")) & {"onnxruntime", "fastapi", "numpy", "uvicorn"}


def test_the_decoder_needs_pillow_simplejpeg_and_numpy_alone() -> None:
    names = modules("imaging")
    assert len(names) > 10
    others = WEB - {"PIL"} | {"pydantic", "onnxruntime", "tqdm", "service", "export", "training"}
    assert not packages(loaded_after(imports_all(names))) & (others | TRAINING_ONLY | TESTING_ONLY)


def test_no_pickle_and_no_eval_in_what_serves() -> None:
    for path in files("service") + files("imaging"):
        assert not packages(imported_by(path)) & {"pickle", "marshal", "shelve"}, path
        calls = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
        assert not {call.func.id for call in calls if isinstance(call.func, ast.Name)} & {"eval", "exec"}, path
