"""Errors keep number, exit code and hint on their way from a job or daemon to a person."""

import msgspec

from lazarette.backup.jobs.model import Failure
from lazarette.runtime.cli.failures import failure
from lazarette.storage.errors import InternalError, NoSpace, NotFound, VolumeNotFound


def test_known_class_comes_back() -> None:
    error = Failure.of(VolumeNotFound("no such volume", hint="laz volume ls")).error()
    assert type(error) is VolumeNotFound
    assert (error.message, error.hint) == ("no such volume", "laz volume ls")
    assert error.exit_code == VolumeNotFound.exit_code


def test_unknown_class_keeps_its_exit_code() -> None:
    error = Failure(9999, "odd", "", 77).error()
    assert type(error) is InternalError
    assert error.exit_code == 77


def test_answer_of_our_daemon() -> None:
    body = {"message": "full", "hint": "grow it", "code": NoSpace.number, "exit": 16}
    error = failure(msgspec.json.encode(body), 507)
    assert type(error) is NoSpace
    assert (error.hint, error.exit_code) == ("grow it", 16)


def test_answer_of_another_engine_is_classed_by_its_status() -> None:
    error = failure(b'{"message":"No such container: x"}', 404)
    assert isinstance(error, NotFound)
    assert error.message == "No such container: x"


def test_answer_that_is_no_json() -> None:
    assert failure(b"bad gateway", 502).message == "bad gateway"
