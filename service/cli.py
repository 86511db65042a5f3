"""Flags and environment variables to `Settings`, and one sentence for each problem with them."""

import difflib
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise

from pydantic import SecretStr, ValidationError
from pydantic_core import ErrorDetails
from pydantic_settings import CliApp, SettingsError

from service.settings import Settings

PREFIX = "PERCEIVER_"
# Kubernetes sets these in every pod of a namespace with a Service called perceiver.
SERVICE_LINK = re.compile(PREFIX + r"(SERVICE_HOST|PORT_\d+_(TCP|UDP|SCTP))")
LINKED = (
    "PERCEIVER_SERVICE_HOST and others of this environment come from a Kubernetes Service that is called perceiver: "
    "set enableServiceLinks: false in the pod's spec, or give the Service another name."
)


class UsageError(Exception):
    """The settings can't be used as they were given.

    Attributes:
        problems: one sentence for each, without secrets.
    """

    def __init__(self, problems: Sequence[str]) -> None:
        self.problems = tuple(problems)
        super().__init__("\n".join(self.problems))


def load_settings(arguments: Sequence[str], environment: Mapping[str, str] = os.environ) -> Settings:
    """Read the settings from flags, then the environment, then the defaults.

    Args:
        arguments: the command line without the program's name; `--help` prints and exits with 0.
        environment: checked for unknown names. Values are read from the process's own environment.

    Raises:
        UsageError: a value is out of bounds, a flag or a PERCEIVER_ variable is unknown, or limits contradict.
    """
    problems = unknown_variables(environment) + empty_flags(arguments)
    try:
        settings = CliApp.run(Settings, cli_args=list(arguments))
    except SettingsError as error:
        problems.append(flag_problem(str(error)))
    except ValidationError as error:
        first: dict[tuple[int | str, ...], ErrorDetails] = {}  # one sentence a setting
        for details in error.errors():
            first.setdefault(details["loc"][:1], details)
        problems.extend(map(value_problem, first.values()))
    if problems:
        raise UsageError(problems)
    return settings


def unknown_variables(environment: Mapping[str, str]) -> list[str]:
    """Return a sentence for each PERCEIVER_ variable that is no setting, since a typing error must not pass.

    Raises:
        UsageError: Kubernetes has set variables with the same prefix.
    """
    known = {variable(name): name for name in Settings.model_fields}
    if any(SERVICE_LINK.fullmatch(name) for name in environment):
        # Among them is PERCEIVER_PORT, with a URL.
        raise UsageError([LINKED])
    unknown = [name for name in environment if name.upper().startswith(PREFIX) and name.upper() not in known]
    return [f"{name} is not a setting{did_you_mean(name.upper(), known)}" for name in sorted(unknown)]


def empty_flags(arguments: Sequence[str]) -> list[str]:
    """Return a sentence for each flag with an empty value, as of a shell's unset variable: it would open the service.

    An empty environment variable counts as unset: docker compose passes on those that its user has not set.
    """
    flags = [argument[:-1] for argument in arguments if argument.startswith("--") and argument.endswith("=")]
    flags += [name for name, value in pairwise(arguments) if not value and name.startswith("--") and "=" not in name]
    return [f"{name} is given an empty value; leave the flag out, or give it one." for name in flags]


def flag_problem(message: str) -> str:
    """Turn the parser's message into a sentence with the nearest flag."""
    message = message.removeprefix("error parsing CLI: ")
    if unknown := re.fullmatch(r"unrecognized arguments: (\S+).*", message, re.DOTALL):
        given = unknown[1].partition("=")[0]
        return f"{given} is not a flag{did_you_mean(given, map(flag, Settings.model_fields))}"
    return message[:1].upper() + message[1:].rstrip(".") + "; --help lists all flags."


def value_problem(details: ErrorDetails) -> str:
    """Turn one of pydantic's errors into a sentence with both names of the setting."""
    message = details["msg"].removeprefix("Value error, ")
    if not details["loc"]:
        return f"{message}."
    name = str(details["loc"][0])
    value = "" if is_secret(name) or details["type"] == "value_error" else f", and it is {details['input']!r}"
    return f"{variable(name)} ({flag(name)}): {message[:1].lower()}{message[1:]}{value}."


def is_secret(name: str) -> bool:
    """Whether a field holds keys, which must not be printed."""
    return SecretStr.__name__ in str(Settings.model_fields[name].annotation)


def variable(name: str) -> str:
    """Return the environment variable of a field."""
    return PREFIX + name.upper()


def flag(name: str) -> str:
    """Return the command-line flag of a field."""
    return "--" + name.replace("_", "-")


def did_you_mean(given: str, known: Iterable[str]) -> str:
    """Return the end of a sentence about an unknown name: the nearest known one, or a hint at --help."""
    nearest = difflib.get_close_matches(given, list(known), n=1, cutoff=0.75)
    return f"; did you mean {nearest[0]}?" if nearest else "; --help lists all."
