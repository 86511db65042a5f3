"""Every command of README and docs is run from the text itself, or checked as far as it can be without its time.

curl, Python and JavaScript run against a real service, in a folder that stands for a clone. `make` is asked what it
would do; the project's own programs read their flags, and those of `RUN` run. What is neither fails, unless it is
marked. Training, export and serving run from the README's text in `tests/end_to_end/test_own_images.py`.
"""

import argparse
import ast
import importlib.util
import json
import os
import re
import runpy
import shlex
import shutil
import signal
import subprocess
import sys
import warnings
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import httpx
import pytest
from packaging.requirements import Requirement
from PIL import Image

from service.cli import load_settings
from tests.docs.blocks import DATA, PROGRAMS, ROOT, SHELL, Block, Command, all_blocks, blocks, commands
from tests.end_to_end.clients.environment import client_python
from tests.end_to_end.process import SECONDS, started

BLOCKS = [block for block in all_blocks() if block.why_not is None]
COMMANDS = [command for block in BLOCKS if block.language in SHELL for command in commands(block)]
SNIPPETS = [block for block in BLOCKS if block.language in PROGRAMS]
OWN = ("benchmarks", "docs", "export", "service", "tests", "training")
RUN = {"training.predict"}
IN_SHELL = {"curl", "echo", "mkdir", "cp"}
IMAGES = ("a.jpg", "b.png", "photo.jpg", "some.png", "image.jpg", "image.png")  # a reader's own
ARGUMENTS = ("docs/apple.png", "docs/examples/five-things")  # of a program that takes an image and a folder
ADDRESS = "localhost:8000"


class Parsed(BaseException):
    """The command line is right, and what it asks for is not done."""


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that looks like the repository; what is written beside its entries is nobody's."""
    folder = tmp_path_factory.mktemp("clone")
    for path in ROOT.iterdir():
        if not path.name.startswith("."):
            (folder / path.name).symlink_to(path)
    for name in IMAGES:
        Image.open(ROOT / "docs" / "apple.png").convert("RGB").save(folder / name)
    (folder / ".curlrc").write_text("fail-with-body\nsilent\nshow-error\n")
    return folder


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Where the shipped model is served."""
    with (
        started(tmp_path_factory.mktemp("service"), "--provider", "cpu", "--request-timeout-ms", "600000") as process,
        process.ready() as client,
    ):
        yield f"{client.base_url.host}:{client.base_url.port}"


@pytest.mark.parametrize("command", COMMANDS, ids=str)
def test_command(command: Command, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    program, *rest = command.words
    if program == "make":
        for line in what_make_runs(command):
            check_own(line, monkeypatch)
    elif (program, *rest[:1]) == ("git", "clone") or program == "cd":
        pass  # the tests run in a clone
    elif Path(program).name == "pip" and rest[0] == "install":
        check_requirements(rest[1:])
    elif "-m" in rest and Path(program).name in ("python", "python3", "torchrun"):
        assert check_own(command.words, monkeypatch), unknown(command)
        if rest[rest.index("-m") + 1] in RUN:
            monkeypatch.chdir(request.getfixturevalue("clone"))
            run_own(command.words, monkeypatch)
    elif program in IN_SHELL:
        done = in_shell(command, request.getfixturevalue("address"), request.getfixturevalue("clone"))
        assert done.returncode == 0, f"{command}\n{done.stderr.decode()}{done.stdout.decode(errors='replace')}"
    else:
        pytest.fail(unknown(command))


def test_an_answer_that_is_an_error(address: str, clone: Path) -> None:
    every = all_blocks()
    ((block, shown),) = [pair for pair in pairwise(every) if pair[0].why_not == "answers an error"]
    (command,) = commands(block)
    answer, promised = json.loads(in_shell(command, address, clone).stdout), json.loads(shown.text)
    for error in (answer["error"], promised["error"]):
        assert error.pop("request_id")
    assert answer == promised


@pytest.mark.timeout(900)  # the first time, the environment of the clients of v2 is made
@pytest.mark.parametrize("snippet", SNIPPETS, ids=lambda block: f"{block.page}:{block.line}")
def test_program(snippet: Block, address: str, clone: Path) -> None:
    text = snippet.text.replace(ADDRESS, address)
    if snippet.language == "python":
        command = [str(python_for(text)), "-c", text, *ARGUMENTS]
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
    else:
        node = shutil.which("node")
        if node is None:
            pytest.skip("no node")
        command, environment = [node, "--input-type=module", "-e", text, *ARGUMENTS], dict(os.environ)
    done = subprocess.run(
        command, cwd=clone, env=environment, capture_output=True, text=True, timeout=4 * SECONDS, check=False
    )
    assert done.returncode == 0, f"{snippet.page}:{snippet.line}\n{done.stderr}"
    promised = re.findall(r"^(?:print|console\.log)\(.*\);?\s+(?:#|//) (.+)$", snippet.text, re.MULTILINE)
    for shown, printed in zip(promised, done.stdout.splitlines(), strict=bool(promised)):
        assert same(shown, printed), f"{snippet.page}:{snippet.line}: prints {printed}, and not {shown}"


def test_every_block_says_what_it_is() -> None:
    """A language that is neither run nor data, and a command that is neither: see `test_command`."""
    known = SHELL | PROGRAMS | DATA
    assert [f"{block.page}:{block.line}: {block.language}" for block in BLOCKS if block.language not in known] == []
    data = [block for block in BLOCKS if block.language == "json" and "..." not in block.text]
    for block in data:
        json.loads(block.text)
    assert any(command.page == "README.md" for command in COMMANDS)


def test_what_is_neither_run_nor_marked_fails_with_its_line() -> None:
    page = "Text.\n\n    frobnicate it\n    docker ps \\\n        --all  # some\n    what it prints\n"
    (block,) = blocks("x.md", page)
    (command,) = commands(block)
    assert (command.line, command.words) == (4, ["docker", "ps", "--all"])
    with pytest.raises(pytest.fail.Exception, match=r"(?s)x\.md:4: docker ps .*<!-- not run: REASON -->"):
        test_command(command, None, None)  # type: ignore[arg-type]


def test_markers() -> None:
    (block,) = blocks("x.md", "<!-- not run: needs Docker -->\n\n    docker ps\n")
    assert block.why_not == "needs Docker"
    whole = list(
        blocks("x.md", "<!-- not run: needs a cluster -->\n# Title\n\n    helm a\n\nText.\n\n```sh\nhelm b\n```\n")
    )
    assert [(block.line, block.why_not) for block in whole] == [(4, "needs a cluster"), (9, "needs a cluster")]
    with pytest.raises(ValueError, match=r"x\.md:1: a marker that no code block follows"):
        list(blocks("x.md", "<!-- not run: needs Docker -->\n\nText.\n\n    docker ps\n"))


def test_a_wrong_flag_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(pytest.fail.Exception, match="--colour"):
        check_own(shlex.split("python -m benchmarks.engine models/m --colour red"), monkeypatch)
    with pytest.raises(pytest.fail.Exception, match="max-bach-size"):
        check_own(shlex.split("python -m service --max-bach-size 3"), monkeypatch)


def in_shell(command: Command, address: str, clone: Path) -> subprocess.CompletedProcess[bytes]:
    """Run a line of a shell in the clone, against the service."""
    text, environment = command.text.replace(ADDRESS, address), os.environ | {"CURL_HOME": str(clone)}
    return subprocess.run(
        ["sh", "-c", text], cwd=clone, env=environment, capture_output=True, timeout=SECONDS, check=False
    )


def run_own(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Run a program of the project within this process, which has imported its libraries."""
    module, *flags = words[words.index("-m") + 1 :]
    monkeypatch.setattr(sys, "argv", [module, *flags])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # it has been imported
        with pytest.raises(SystemExit) as end:
            runpy.run_module(module, run_name="__main__", alter_sys=True)
    assert not end.value.code


def unknown(command: Command) -> str:
    return f"{command}\nis neither run nor marked: put <!-- not run: REASON --> before its block"


def what_make_runs(command: Command) -> list[list[str]]:
    """The lines that make would run, as words."""
    done = subprocess.run(
        ["make", "-n", *command.words[1:]], cwd=ROOT, capture_output=True, text=True, timeout=SECONDS, check=False
    )
    assert done.returncode == 0, f"{command}\n{done.stderr}"
    lines = [re.sub(r"\$\([^)]*\)", "", line) for line in done.stdout.splitlines()]
    return [shlex.split(line, comments=True) for line in lines if " -m " in line]


def check_own(words: list[str], monkeypatch: pytest.MonkeyPatch) -> bool:
    """Have a program of the project read the flags of `... -m PROGRAM FLAGS`; False for another program."""
    module, *flags = words[words.index("-m") + 1 :]
    flags = flags[: next((at for at, word in enumerate(flags) if word in ("||", "&&", ";", "|", "&")), len(flags))]
    if module in ("pip", "venv"):
        return True
    if module == "pytest":
        missing = [word for word in flags if word.startswith("tests") and not (ROOT / word.partition("::")[0]).exists()]
        assert not missing, missing
        return True
    if module.partition(".")[0] not in OWN:
        return False
    if module == "service":
        try:
            load_settings(flags, {})
        except Exception as error:
            pytest.fail(f"{shlex.join(words)}: {error}")
        return True
    parse_args = argparse.ArgumentParser.parse_args

    def only_parse(self: argparse.ArgumentParser, *arguments: object) -> None:
        parse_args(self, *arguments)  # type: ignore[call-overload]
        raise Parsed

    said: list[str] = []
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    with monkeypatch.context() as patched, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it may have been imported by another test
        patched.setattr(argparse.ArgumentParser, "parse_args", only_parse)
        patched.setattr(argparse.ArgumentParser, "error", lambda self, message: (said.append(message), sys.exit(2)))
        patched.setattr(sys, "argv", [module, *flags])
        try:
            runpy.run_module(module, run_name="__main__", alter_sys=True)
        except Parsed:
            return True
        except SystemExit:
            pytest.fail(f"{shlex.join(words)}: {' '.join(said)}")
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
    pytest.fail(f"{shlex.join(words)}: reads no flags")


def check_requirements(words: list[str]) -> None:
    """Check that the words are requirements, or flags with files that are there."""
    for flag, word in zip(["", *words], words, strict=False):
        if flag in ("-c", "-r", "--constraint", "--requirement"):
            assert (ROOT / word).is_file(), word
        elif not word.startswith(("-", ".")):
            Requirement(word)


def python_for(text: str) -> Path:
    """The interpreter that has what a program imports: this one, or that of the clients of v2."""
    nodes = list(ast.walk(ast.parse(text)))
    names = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    names |= {node.module or "" for node in nodes if isinstance(node, ast.ImportFrom)}
    here = all(importlib.util.find_spec(name.partition(".")[0]) for name in names)
    return Path(sys.executable) if here else client_python()


def same(shown: str, printed: str) -> bool:
    """Whether two lines are the same, but for the last digits of fractions, which are the processor's."""
    number = re.compile(r"\d+\.\d+")
    if number.sub("#", shown) != number.sub("#", printed):
        return False
    pairs = zip(number.findall(shown), number.findall(printed), strict=True)
    return all(abs(float(one) - float(other)) <= 0.02 for one, other in pairs)


def test_the_service_that_answers_is_the_shipped_model(address: str) -> None:
    assert httpx.get(f"http://{address}/health", timeout=SECONDS).json()["model"] == "perceiver-cifar100"
