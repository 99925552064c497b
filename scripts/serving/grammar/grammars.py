"""The compiled guides of an engine."""

from __future__ import annotations

import threading
from collections import OrderedDict
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from serving.errors import InvalidRequest
from serving.grammar.compiler import GuideCompiler
from serving.grammar.matcher import Matcher
from serving.protocol import Guide

if TYPE_CHECKING:
    from llguidance import LLMatcher

MAX_KEPT = 64
MAX_KEPT_BYTES = 4 * 1024 * 1024
"""Of the guides' texts. What is compiled takes a multiple of it."""


class Grammars:
    """Compiles guides for the tokenizer in `folder`, and keeps the latest. Thread-safe.

    It trusts guides to be checked (see `check`): a hostile guide could take long to compile, or end
    this process.
    """

    def __init__(self, folder: Path) -> None:
        self._compiler = GuideCompiler(folder)
        self._compiling = threading.Lock()
        self._lock = threading.Lock()
        self._compiled: OrderedDict[Guide, LLMatcher] = OrderedDict()
        self._num_bytes = 0

    @property
    def num_kept(self) -> int:
        return len(self._compiled)

    def load(self) -> None:
        """Read the tokenizer now: it can stop the process's other threads for a second.

        A tokenizer that cannot be used is reported with each guide.
        """
        with self._compiling, suppress(InvalidRequest):
            self._compiler.load_tokenizer()

    def matcher(self, guide: Guide) -> Matcher:
        """A matcher at the beginning of a text. Takes a millisecond, for huge guides up to a second.

        Raises InvalidRequest when the guide does not compile or the model's tokenizer cannot be
        used.
        """
        with self._compiling:
            with self._lock:
                compiled = self._compiled.get(guide)
            if compiled is None:
                compiled = self._compiler.compile(guide)
            with self._lock:
                self._keep(guide, compiled)
        return Matcher(
            compiled.deep_copy(),
            self._compiler.num_words,
            self._compiler.end_ids,
            lambda: self._drop(guide, compiled),
        )

    def _keep(self, guide: Guide, compiled: LLMatcher) -> None:
        if guide not in self._compiled:
            self._compiled[guide] = compiled
            self._num_bytes += _num_bytes(guide)
        self._compiled.move_to_end(guide)
        while len(self._compiled) > MAX_KEPT or self._num_bytes > MAX_KEPT_BYTES:
            oldest, _ = self._compiled.popitem(last=False)
            self._num_bytes -= _num_bytes(oldest)

    def _drop(self, guide: Guide, compiled: LLMatcher) -> None:
        """Copies share the lexer. One that failed would fail the next text, too."""
        with self._lock:
            if self._compiled.get(guide) is compiled:
                del self._compiled[guide]
                self._num_bytes -= _num_bytes(guide)


def _num_bytes(guide: Guide) -> int:
    return len(guide.text.encode())
