"""Test code. Records what a caller uses of this package: one `Class.member` per line.

On when `STANDIN_TRTLLM_TOUCHES` names a file. What this package itself reads is not recorded.
"""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Iterable
from pathlib import Path
from types import FrameType
from typing import Any

PATH = os.environ.get("STANDIN_TRTLLM_TOUCHES", "")
enabled = bool(PATH)
_seen: set[str] = set()
_lock = threading.Lock()
# Reads that a caller makes through these are no use of a certain member.
_GENERIC = ("tensorrt_llm", "dataclasses", "copy", "inspect", "pydantic")


def touch(*names: str) -> None:
    """Note that a caller used `names`."""
    if not enabled or _seen.issuperset(names):
        return
    with _lock:
        fresh = [name for name in dict.fromkeys(names) if name not in _seen]
        _seen.update(fresh)
        with Path(PATH).open("a") as file:
            file.writelines(f"{name}\n" for name in fresh)


def keywords(owner: str, given: Iterable[str]) -> None:
    """Note that `owner` was called with these keywords, if its caller's caller is not from here."""
    if enabled and _is_caller(sys._getframe(2)):
        touch(owner, *(f"{owner}.{name}" for name in given))


def _is_caller(frame: FrameType) -> bool:
    return not str(frame.f_globals.get("__name__", "")).startswith(_GENERIC)


class Watched:
    """Base of generated classes: notes which public attributes a caller reads."""

    __slots__ = ()

    if enabled:

        def __getattribute__(self, name: str) -> Any:
            value = object.__getattribute__(self, name)
            if not name.startswith("_") and _is_caller(sys._getframe(1)):
                touch(f"{type(self).__name__}.{name}")
            return value
