"""Errors on the wire: from `protocol.ErrorInfo` back to `serving.errors`."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import NoReturn

from serving.errors import (
    DeadlineExceeded,
    EngineFailed,
    InvalidRequest,
    KvNotFetched,
    ModelNotFound,
    NoInstances,
    Overloaded,
    QueuedTooLong,
    RequestTooLarge,
    ServingError,
)
from serving.protocol import ErrorInfo

_REBUILT: dict[str, Callable[[ErrorInfo], ServingError]] = {
    "InvalidRequest": lambda info: InvalidRequest(info.message, param=info.param, code=info.code),
    "ModelNotFound": lambda info: ModelNotFound(info.message, param=info.param, code=info.code),
    "RequestTooLarge": lambda info: RequestTooLarge(info.message, param=info.param, code=info.code),
    "Overloaded": lambda info: Overloaded(info.message, retry_after_s=info.retry_after_s),
    "NoInstances": lambda info: NoInstances(info.message, retry_after_s=info.retry_after_s),
    "QueuedTooLong": lambda info: QueuedTooLong(info.message, retry_after_s=info.retry_after_s),
    "KvTransferFailed": lambda info: KvNotFetched(info.message),
    "DeadlineExceeded": lambda info: _deadline_exceeded(info.message),
}
_DEADLINE = re.compile(r"(.*) ran past its deadline of (\S+) s(?: \(`(.*)`\))?")


def raise_error(info: ErrorInfo) -> NoReturn:
    """Raise the error that `info` describes.

    Kinds that have a meaning only inside a worker become EngineFailed, and so do unknown kinds.
    """
    rebuild = _REBUILT.get(info.kind)
    raise EngineFailed(info.message) if rebuild is None else rebuild(info)


def _deadline_exceeded(message: str) -> ServingError:
    found = _DEADLINE.fullmatch(message)
    try:
        if found is not None:
            return DeadlineExceeded(found[1], float(found[2]), setting=found[3] or "")
    except ValueError:
        pass
    return EngineFailed(message)
