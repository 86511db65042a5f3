"""The hierarchy as clients see it."""

from service import errors
from service.errors import ServiceError


def hierarchy() -> list[type[ServiceError]]:
    kinds = [ServiceError]
    for kind in kinds:
        kinds.extend(kind.__subclasses__())
    return kinds


def test_every_error_has_its_own_code_a_status_and_a_sentence() -> None:
    kinds = hierarchy()
    assert len({kind.code for kind in kinds}) == len(kinds) > 25
    assert all(400 <= kind.status < 600 for kind in kinds)
    assert all(kind.default.endswith((".", "jpg")) for kind in kinds)


def test_the_docstring_prints_the_hierarchy_as_it_is() -> None:
    printed = {
        tuple(line.replace("├──", "").replace("└──", "").replace("│", "").split()[:3])
        for line in (errors.__doc__ or "").splitlines()
        if any(kind.__name__ in line.split() for kind in hierarchy())
    }
    assert printed == {(kind.__name__, str(kind.status), kind.code) for kind in hierarchy()}


def test_a_message_of_its_own_replaces_the_default() -> None:
    assert errors.NotAnImage().message == errors.NotAnImage.default
    assert str(errors.NotAnImage("no")) == "no"
    assert errors.Overloaded(retry_after=3).retry_after == 3
