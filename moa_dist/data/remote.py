"""Downloads whole files from object storage and web servers: s3, gs, https and hf, by fsspec.

Credentials come from the environment, where each service's own library looks for them. Every
attempt ends in bounded time, whatever the server does, and so do all attempts together.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from typing import TypeVar
from urllib.parse import urlsplit

from moa_dist.config.data import REMOTE_EXTRAS
from moa_dist.errors import DataError

Result = TypeVar("Result")

_ATTEMPTS = 6
_FIRST_PAUSE_S = 0.5
"""Before the second attempt; each further pause is twice as long."""
_PATIENCE_S = 30.0
"""How long an attempt may take, and a second more for each MiB."""
_TOTAL_S = 200.0
"""How long all attempts may take: less than a step, or than training waits for a worker, so that
this error is the one that is reported."""
_TRY_AGAIN = (408, 425, 429)
"""Client errors of HTTP that pass."""


class WrongContentError(Exception):
    """What was downloaded is not the file that was announced, such as by the manifest."""


def download(url: str, check: Callable[[bytes], str | None], size: int = 0) -> bytes:
    """Return the content of a file.

    Args:
        url: the file.
        check: returns what is wrong with the content, or None.
        size: expected number of bytes, for the time limit.

    Raises:
        DataError: the file does not exist, may not be read, or could not be read intact in several
            attempts.
    """

    def read() -> bytes:
        content = _read(url)
        if problem := check(content):
            raise WrongContentError(problem)
        return content

    return attempt(url, read, limit_s=time_limit(size), total_s=_TOTAL_S)


def time_limit(size: int) -> float:
    """Return how many seconds an attempt to read so many bytes may take."""
    return _PATIENCE_S + size / 2**20


def attempt(url: str, work: Callable[[], Result], *, limit_s: float, total_s: float) -> Result:
    """Return what `work` returns, which is called again if it fails in a way that may pass.

    Args:
        url: what is read, for messages.
        work: reads it; raises WrongContentError if what it has read is not intact.
        limit_s: how long each attempt may take.
        total_s: how long all of them may take together.

    Raises:
        DataError: no attempt succeeded, or trying again would not help.
    """
    deadline = time.monotonic() + total_s
    reason: Exception = TimeoutError(f"no time left of {total_s:.0f} s")
    attempts = 0
    for pause in _pauses():
        time.sleep(pause)
        left_s = deadline - time.monotonic()
        if left_s <= 0:
            break
        attempts += 1
        try:
            return _within(min(limit_s, left_s), work)
        except Exception as error:  # libraries of five services, each with errors of its own
            if is_final(error):
                raise DataError(f"{url}: {explain(error, url)}") from error
            reason = error
    raise DataError(
        f"{url}: {attempts} attempts failed, the last one with: {explain(reason, url)}",
        key="sha256" if isinstance(reason, WrongContentError) else None,
    ) from reason


def is_final(error: Exception) -> bool:
    """Whether trying again would not help."""
    if isinstance(error, FileNotFoundError | PermissionError | ImportError):
        return True
    if type(error).__name__ in ("NoCredentialsError", "ParamValidationError"):  # of botocore
        return True
    status = _status(error)
    return status is not None and 400 <= status < 500 and status not in _TRY_AGAIN


def _status(error: BaseException) -> int | None:
    """Return the HTTP status of an error: of aiohttp, gcsfs or huggingface_hub."""
    for owner, name in ((error, "status"), (error, "code"), (error, "response")):
        status = getattr(owner, name, None)
        status = getattr(status, "status_code", status)
        if isinstance(status, int):
            return status
    return None


def explain(error: BaseException, url: str) -> str:
    """Describe what went wrong with a URL in one line."""
    if isinstance(error, ImportError):
        extra = REMOTE_EXTRAS[urlsplit(url).scheme]
        return f"needs a package that is not installed; pip install 'moa-dist[{extra}]'"
    if isinstance(error, FileNotFoundError):
        return "no such file or bucket; check the path in the configuration"
    is_refused = isinstance(error, PermissionError) or _status(error) in (401, 403)
    if is_refused or type(error).__name__ == "NoCredentialsError":
        return (
            "no permission to read it; set the credentials in the environment of every rank "
            "(such as AWS_ACCESS_KEY_ID, GOOGLE_APPLICATION_CREDENTIALS or HF_TOKEN)"
        )
    if isinstance(error, WrongContentError):
        return str(error)
    name, text = type(error).__name__, str(error).partition("\n")[0]
    return f"{name}: {text}"[:300] if text else name


def _pauses() -> Iterator[float]:
    yield 0.0
    for attempt in range(_ATTEMPTS - 1):
        yield _FIRST_PAUSE_S * 2**attempt


def _read(url: str) -> bytes:
    import fsspec  # takes half a second, and most runs read local files

    system, path = fsspec.core.url_to_fs(url)
    content: bytes = system.cat_file(path)
    return content


def _within(limit_s: float, work: Callable[[], Result]) -> Result:
    """Return what `work` returns; raise TimeoutError if it takes too long, and leave it behind."""
    result: list[Result] = []
    failure: list[BaseException] = []

    def run() -> None:
        try:
            result.append(work())
        except BaseException as error:
            failure.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(limit_s)
    if failure:
        raise failure[0]
    if not result:
        raise TimeoutError(f"no answer within {limit_s:.0f} s")
    return result[0]
