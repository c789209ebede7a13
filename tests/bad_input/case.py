"""One kind of bad input: how it is made, where it is met, and what the error must name."""

from __future__ import annotations

import contextlib
import io
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from moa_dist.cli.main import main
from moa_dist.config import load_config
from moa_dist.errors import ConfigError, MoaDistError

TIMEOUT_S = 30
Make = Callable[[Path], object]
Meet = Callable[[Path], str | MoaDistError]


@dataclass(frozen=True)
class BadInput:
    """A row of the table."""

    name: str
    """Unique among all rows."""
    make: Make
    """Makes or breaks something in an empty folder or one that the table prepares."""
    meet: Meet
    """Gives it to the product, in that folder; returns the error, or what was printed of it."""
    says: tuple[str, ...] = ()
    """Facts in the message: names, numbers, options."""
    keys: tuple[str, ...] | None = None
    """The fields that the first problem of a configuration names."""
    sources: tuple[str, ...] | None = None
    """The files and lines, or the override, that it gives as its source."""


class TookTooLongError(BaseException):
    """Not an Exception, so that nothing in the product can take it for one of its own."""


@contextlib.contextmanager
def time_limit(seconds: int = TIMEOUT_S) -> Iterator[None]:
    def stop(*_: object) -> None:
        raise TookTooLongError(f"no answer within {seconds} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def command(*arguments: str) -> Callable[[Path], str]:
    """Meets it as an argument of `moa-dist`, which must exit with 2 and an error alone."""

    def run(folder: Path) -> str:
        printed, errors = io.StringIO(), io.StringIO()
        with (
            contextlib.chdir(folder),
            contextlib.redirect_stdout(printed),
            contextlib.redirect_stderr(errors),
        ):
            assert main(arguments) == 2
        assert printed.getvalue() == ""
        assert "Traceback" not in errors.getvalue()
        return errors.getvalue()

    return run


def raised_by(function: Callable[[Path], object]) -> Meet:
    """Meets it in a function, which must raise an error for a person."""

    def run(folder: Path) -> MoaDistError:
        try:
            function(folder)
        except MoaDistError as error:
            return error
        raise AssertionError("nothing was raised")

    return run


def config_check(*overrides: str) -> Meet:
    """Meets it in `moa-dist config check run.yaml`, which must print the error that is raised."""
    printed_by_command = command("config", "check", "run.yaml", *overrides)

    def run(folder: Path) -> ConfigError:
        printed = printed_by_command(folder)
        with contextlib.chdir(folder), pytest.raises(ConfigError) as caught:
            load_config("run.yaml", overrides)
        assert printed == f"{caught.value}\n"
        return caught.value

    return run


def file(name: str, content: str | bytes) -> Make:
    """Writes a file."""

    def make(folder: Path) -> None:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())

    return make
