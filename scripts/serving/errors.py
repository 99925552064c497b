"""The error tree. A type says who can act on it.

Only `frontend/api/errors.py` maps types to status codes.
"""

from __future__ import annotations

import errno


class ServingError(Exception):
    """Base of everything this project raises on purpose."""


# --- the caller of the API can act -------------------------------------------------------------


class InvalidRequest(ServingError):
    """The request cannot be served as written (HTTP 400).

    `param` names the offending field and `code` is a stable machine-readable reason,
    as in OpenAI's error object.
    """

    def __init__(self, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.message, self.param, self.code = message, param, code


class ModelNotFound(InvalidRequest):
    """No such model is served here (HTTP 404)."""


class NotFound(InvalidRequest):
    """The request names something that is not here (HTTP 404)."""


class RequestTooLarge(InvalidRequest):
    """The body exceeds `frontend.max_body_bytes` (HTTP 413)."""


class Overloaded(ServingError):
    """Every instance that could serve this is full; try again after `retry_after_s` (HTTP 429 or 503)."""

    def __init__(self, message: str, *, retry_after_s: float = 1.0) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class NoInstances(Overloaded):
    """No live instance has the role that the request needs (HTTP 503)."""


class QueuedTooLong(Overloaded):
    """No engine began the request within `deadlines.queue_s` of its arrival there (HTTP 503)."""


class DeadlineExceeded(ServingError):
    """A phase (`prefill`, `first token`, `total`) ran past its deadline (HTTP 504).

    `setting` is the config key of the deadline, if it has one.
    """

    def __init__(self, phase: str, deadline_s: float, *, setting: str = "") -> None:
        where = f" (`{setting}`)" if setting else ""
        super().__init__(f"{phase} ran past its deadline of {deadline_s:g} s{where}")
        self.phase, self.deadline_s, self.setting = phase, deadline_s, setting


# --- the router or the worker can act ----------------------------------------------------------


class InstanceLost(ServingError):
    """The instance died, left or stopped answering: choose another one."""

    def __init__(self, instance_id: str, why: str = "connection lost") -> None:
        super().__init__(f"{instance_id}: {why}")
        self.instance_id = instance_id


class InstanceRefused(ServingError):
    """A registered instance does not fit this deployment: it is reported and gets no requests."""

    def __init__(self, instance_id: str, reason: str) -> None:
        super().__init__(f"{instance_id} refused: {reason}")
        self.instance_id, self.reason = instance_id, reason


class KvTransferFailed(ServingError):
    """KV blocks could not be fetched: prefill locally instead."""

    def __init__(self, request_id: str, source: str, why: str) -> None:
        super().__init__(f"KV of {request_id} from {source}: {why}")
        self.request_id, self.source = request_id, source


class EngineFailed(ServingError):
    """The engine could not finish a request for a reason of its own (HTTP 500)."""


class KvNotFetched(EngineFailed):
    """A decode worker could not fetch KV while it was being computed. Its engine is well."""


class RequestQuarantined(ServingError):
    """Instances failed one after the other while they computed it, so it is not tried on another
    (HTTP 500)."""


# --- the person at the terminal can act --------------------------------------------------------


class OperatorError(ServingError):
    """The operator of the workflow can fix it: `what` is wrong, `remedy` is what to change."""

    def __init__(self, what: str, *, remedy: str = "") -> None:
        super().__init__(f"{what}\n  -> {remedy}" if remedy else what)
        self.what, self.remedy = what, remedy


class ConfigError(OperatorError):
    """A config key is wrong; `key` is its dotted path."""

    def __init__(self, key: str, what: str, *, remedy: str = "") -> None:
        super().__init__(f"config key `{key}`: {what}" if key else what, remedy=remedy)
        self.key = key


class ModelError(OperatorError):
    """The model cannot be fetched, read or run exactly."""


_DISK_REASONS = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the disk quota is used up",
    errno.EROFS: "the disk is mounted read-only",
    errno.EFBIG: "the file would be larger than this process may write (`ulimit -f`)",
}


def disk_error(exc: OSError) -> OperatorError | None:
    """What to tell a person when a disk takes no more; None for any other error."""
    reason = _DISK_REASONS.get(exc.errno or 0)
    if reason is None:
        return None
    where = f" at {exc.filename}" if exc.filename else ""
    return OperatorError(
        f"{reason}{where}",
        remedy="free some space, or move this folder (`results`, `run`, `logs`) to a larger disk; "
        "then run the same target again",
    )
