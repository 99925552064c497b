"""Test code. What goes wrong with one request."""


class RequestError(RuntimeError):
    """Raised where the result of the request is awaited."""
