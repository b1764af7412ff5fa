"""Failures of a reward's service that pass by themselves, and the question asked again.

A reward may ask a server. One that is busy, restarts or does not answer in time is asked again; any other failure is
raised at once. No HTTP library is imported here: an error is known by its status, and by the errors that caused it.
"""

import itertools
import logging
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any, TypeVar

T = TypeVar("T")

logger = logging.getLogger(__name__)

ATTEMPTS = 5  # so often a reward is asked before its failure is raised; its own attribute `attempts` says otherwise
FIRST_PAUSE = 1.0  # seconds before it is asked again, doubled each time
LONGEST_PAUSE = 60.0  # seconds; a server that asks for more is not waited for
STATUSES = (429, 502, 503, 504)  # too many requests, bad gateway, unavailable, gateway timeout
NAMES = {"Timeout", "TransportError", "ClientConnectionError", "APIConnectionError"}
"""Base classes of clients' errors of connection whose cause need not be one of Python's own."""


def ask_until_answered(title: str, attempts: int, ask: Callable[[], T], final: type[Exception] | tuple[()] = ()) -> T:
    """`ask()`, asked again after a failure that passes by itself. Raises its error otherwise, after that many attempts,
    and where it is `final`."""
    for attempt in itertools.count(1):
        try:
            return ask()
        except final:
            raise
        except Exception as error:
            pause = pause_before_retry(error, FIRST_PAUSE * 2 ** (attempt - 1))
            if pause is None or attempt >= attempts:
                if pause is not None:
                    error.add_note(f"asked {attempt} times")
                raise
            words = f"{type(error).__name__}: {' '.join(str(error).split())}"
        # Outside the handler: the error's frames, which hold the batch's tensors, are gone.
        logger.warning("%s: %s; asked again in %.3g s (%d of %d)", title, words, pause, attempt + 1, attempts)
        time.sleep(pause)
    raise AssertionError


def pause_before_retry(error: BaseException, pause: float) -> float | None:
    """Seconds to wait before the question is asked again, `pause` or what the server wants; None where the failure does
    not pass by itself."""
    for cause in _causes(error):
        response = getattr(cause, "response", None)
        status = _first_number(*(getattr(cause, name, None) for name in ("code", "status", "status_code")), response)
        if status is not None:
            if status not in STATUSES:
                return None
            pause = max(pause, _retry_after(getattr(cause, "headers", None) or getattr(response, "headers", None)))
            return pause if pause <= LONGEST_PAUSE else None
        if isinstance(cause, (ConnectionError, TimeoutError)) or NAMES & {kind.__name__ for kind in type(cause).__mro__}:
            return min(pause, LONGEST_PAUSE)
    return None


def _causes(error: BaseException) -> Iterator[BaseException]:
    """The error, then what it was raised from: its reason, as urllib has it, its cause or its context."""
    seen: set[int] = set()
    current: BaseException | None = error
    while current is not None and id(current) not in seen:
        yield current
        seen.add(id(current))
        reason = getattr(current, "reason", None)
        context = None if current.__suppress_context__ else current.__context__
        current = reason if isinstance(reason, BaseException) else current.__cause__ or context


def _first_number(*values: Any) -> int | None:
    """The HTTP status among these: a number, or that of a response."""
    for value in values:
        status = getattr(value, "status_code", None) or getattr(value, "status", value)
        if isinstance(status, int) and 100 <= status < 600:
            return status
    return None


def _retry_after(headers: Any) -> float:
    """Seconds of the header Retry-After, which is a number or a date; 0 without one that can be read."""
    text = str(headers.get("Retry-After") or "").strip() if hasattr(headers, "get") else ""
    try:
        return max(0.0, float(text))
    except ValueError:
        pass
    try:
        until = parsedate_to_datetime(text)
    except ValueError:
        return 0.0
    return max(0.0, (until.replace(tzinfo=until.tzinfo or UTC) - datetime.now(UTC)).total_seconds())
