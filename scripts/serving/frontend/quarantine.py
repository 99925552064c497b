"""Which requests are not tried again, because the instances that computed them failed.

Most requests whose instance fails are innocent. One that fails a second instance, before that one
has given any output for it, probably is the cause, and would take down every instance in turn.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable

import msgspec
from xxhash import xxh3_64_intdigest

from serving.errors import RequestQuarantined
from serving.text.preprocess import PreparedRequest

MAX_FAILURES = 4
"""Failed instances of a request that gave output in between: long answers see more than one."""
QUARANTINE_S = 300.0
"""How long the same request is refused when it is sent again."""
MAX_REQUESTS = 1024


class Failures:
    """The instances that failed while they computed one request."""

    def __init__(self) -> None:
        self.count = 0
        self._is_cause = False

    def add(self, *, had_output: bool) -> None:
        """`had_output`: the instance had given some of this request's output."""
        self.count += 1
        self._is_cause = (self.count > 1 and not had_output) or self.count >= MAX_FAILURES

    @property
    def is_cause(self) -> bool:
        """Whether the request itself probably makes instances fail."""
        return self._is_cause


class Quarantine:
    """The requests that made instances fail, by their content. Forgets them after a while."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._until: OrderedDict[int, float] = OrderedDict()

    def add(self, prepared: PreparedRequest) -> None:
        self._until[_content(prepared)] = self._clock() + QUARANTINE_S
        while len(self._until) > MAX_REQUESTS:
            self._until.popitem(last=False)

    def require_innocent(self, prepared: PreparedRequest) -> None:
        """Raises RequestQuarantined for the same prompt and sampling as one that was added."""
        if not self._until:
            return
        content = _content(prepared)
        until = self._until.get(content)
        if until is None:
            return
        if self._clock() >= until:
            del self._until[content]
            return
        raise RequestQuarantined(
            "workers failed twice while they computed this request; the same request is refused "
            f"for {QUARANTINE_S / 60:.0f} minutes"
        )


def _content(prepared: PreparedRequest) -> int:
    return xxh3_64_intdigest(msgspec.msgpack.encode((prepared.token_ids, prepared.sampling)))
