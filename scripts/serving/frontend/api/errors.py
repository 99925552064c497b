"""Errors in OpenAI's format. Only this module maps error types to status codes."""

from __future__ import annotations

import logging
import math

import orjson
from msgspec import Struct

from serving.errors import (
    DeadlineExceeded,
    EngineFailed,
    InstanceLost,
    InvalidRequest,
    ModelNotFound,
    NoInstances,
    NotFound,
    Overloaded,
    RequestQuarantined,
    RequestTooLarge,
)
from serving.frontend.http.body import UnsupportedMedia
from serving.frontend.http.limits import BodyTimeout, TooManyInFlight

log = logging.getLogger("serving.frontend")


class ApiError(Struct, frozen=True):
    """One error response."""

    status: int
    message: str
    type: str
    param: str | None = None
    code: str | None = None
    retry_after_s: float | None = None

    def body(self) -> bytes:
        """`{"error": {...}}`."""
        return orjson.dumps(
            {
                "error": {
                    "message": self.message,
                    "type": self.type,
                    "param": self.param,
                    "code": self.code,
                }
            }
        )

    def headers(self) -> list[tuple[bytes, bytes]]:
        """Headers of this error alone."""
        if self.retry_after_s is None:
            return []
        return [(b"retry-after", str(max(1, math.ceil(self.retry_after_s))).encode())]


def to_api_error(exc: Exception) -> ApiError:
    """The error response for `exc`. Unexpected errors are logged here and sent without details."""
    match exc:
        case InvalidRequest():
            return _client_error(exc)
        case TooManyInFlight():
            return ApiError(
                429,
                str(exc),
                "rate_limit_error",
                code="rate_limit_exceeded",
                retry_after_s=exc.retry_after_s,
            )
        case Overloaded():
            code = "no_instances" if isinstance(exc, NoInstances) else "overloaded"
            return ApiError(
                503, str(exc), "server_error", code=code, retry_after_s=exc.retry_after_s
            )
        case InstanceLost():
            return ApiError(503, str(exc), "server_error", code="instance_lost", retry_after_s=1.0)
        case DeadlineExceeded():
            return ApiError(504, str(exc), "server_error", code="deadline_exceeded")
        case RequestQuarantined():
            return ApiError(500, str(exc), "server_error", code="request_quarantined")
        case EngineFailed():
            log.error("engine failed: %s", exc)
            return ApiError(500, str(exc), "server_error", code="engine_failed")
        case RecursionError():
            # Only what a caller sends is nested: schemas, arguments of calls, template variables.
            log.info("a request is nested too deeply: %s", exc)
            message = "The request is nested too deeply"
            return ApiError(400, message, "invalid_request_error", code="invalid_value")
    log.error("unexpected %s: %s", type(exc).__name__, exc, exc_info=exc)
    return ApiError(
        500, "The server failed; its log has the details", "server_error", code="internal_error"
    )


def _client_error(exc: InvalidRequest) -> ApiError:
    status = 400
    match exc:
        case ModelNotFound() | NotFound():
            status = 404
        case RequestTooLarge():
            status = 413
        case UnsupportedMedia():
            status = 415
        case BodyTimeout():
            status = 408
    return ApiError(status, exc.message, "invalid_request_error", exc.param, exc.code)


def routing_error(status: int, method: str, path: str) -> ApiError:
    """The error for an unknown path or a wrong method."""
    if status == 405:
        message, code = f"{method} is not allowed for {path}", "method_not_allowed"
    else:
        message, code = f"There is no {method} {path}", "unknown_url"
    return ApiError(status, message, "invalid_request_error", code=code)
