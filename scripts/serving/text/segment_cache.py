"""Tokenize long prompts piece by piece, and remember the pieces.

Agents send the same instructions, tools and history again with each request. Special tokens cut a
rendered prompt into pieces that a byte-level tokenizer encodes independently of each other, so the
ids of a piece that came before need not be computed again. A tokenizer for which that is not so
encodes every prompt whole.
"""

from __future__ import annotations

import re
import threading
from collections import OrderedDict
from typing import NamedTuple

from tokenizers import Tokenizer

MIN_PROMPT_CHARS = 512
"""Shorter prompts are encoded whole: looking pieces up would cost as much."""

MAX_CHARS = 8 * 1024 * 1024
"""Text that is remembered at most; its ids take about as many bytes again."""
PIECE_CHARS = 256
"""What a piece counts for beside its text."""

_SAMPLES = ("{0}user\nhello  world{0}\n\n  x", "a{0} b{0}{0}é\t{0}", "{0}", " {0} ")


class SegmentedText(NamedTuple):
    """A text in pieces, and the ids of each piece; None where they are not known."""

    texts: list[str]
    ids: list[list[int] | None]

    @property
    def num_missing_chars(self) -> int:
        return sum(len(t) for t, ids in zip(self.texts, self.ids, strict=True) if ids is None)


class SegmentCache:
    """Encodes rendered prompts, which write their special tokens themselves. Thread-safe."""

    def __init__(self, tokenizer: Tokenizer, max_chars: int = MAX_CHARS) -> None:
        self._tokenizer, self._max_chars = tokenizer, max_chars
        self._ids = {
            token.content: token_id
            for token_id, token in tokenizer.get_added_tokens_decoder().items()
        }
        names = sorted(self._ids, key=len, reverse=True)
        self._cut = re.compile("(" + "|".join(map(re.escape, names)) + ")") if names else None
        self._lock = threading.Lock()
        self._known: OrderedDict[str, list[int]] = OrderedDict()
        self._num_chars = 0
        self.is_usable = self._cut is not None and self._pieces_are_independent()

    def encode(self, text: str) -> list[int]:
        """The same ids as the tokenizer gives for the whole text, without its own special tokens."""
        return self.ids(self.look_up(text))

    def look_up(self, text: str) -> SegmentedText:
        """The pieces of a text, with the ids that are known. Quick."""
        if not self.is_usable or len(text) < MIN_PROMPT_CHARS:
            return SegmentedText([text], [None])
        return self._look_up(text)

    def ids(self, pieces: SegmentedText) -> list[int]:
        """All ids; encodes what is missing, which takes a microsecond for a few characters."""
        missing = [t for t, ids in zip(pieces.texts, pieces.ids, strict=True) if ids is None]
        encoded = iter(self._encode(missing) if missing else [])
        result: list[int] = []
        for text, ids in zip(pieces.texts, pieces.ids, strict=True):
            if ids is None:
                ids = next(encoded)
                if len(pieces.texts) > 1:
                    self._remember(text, ids)
            result += ids
        return result

    def _look_up(self, text: str) -> SegmentedText:
        assert self._cut is not None
        texts = self._cut.split(text)
        found: list[list[int] | None] = []
        with self._lock:
            for place, piece in enumerate(texts):
                if place % 2:  # a special token
                    found.append([self._ids[piece]])
                    continue
                ids = self._known.get(piece)
                if ids is not None:
                    self._known.move_to_end(piece)
                found.append(ids if piece else [])
        return SegmentedText(texts, found)

    def _remember(self, piece: str, ids: list[int]) -> None:
        if len(piece) + PIECE_CHARS > self._max_chars:
            return
        with self._lock:
            if piece not in self._known:
                self._num_chars += len(piece) + PIECE_CHARS
            self._known[piece] = ids
            while self._num_chars > self._max_chars:
                oldest, _ = self._known.popitem(last=False)
                self._num_chars -= len(oldest) + PIECE_CHARS

    def _encode(self, texts: list[str]) -> list[list[int]]:
        # Only the call for batches computes no offsets into the text. A batch of several would wake
        # the library's threads, which costs more than a short text.
        encode = self._tokenizer.encode_batch_fast
        return [encode([text], add_special_tokens=False)[0].ids for text in texts]

    def _pieces_are_independent(self) -> bool:
        added = self._tokenizer.get_added_tokens_decoder().values()
        if any(token.lstrip or token.rstrip or token.single_word for token in added):
            return False
        parts = f"{self._tokenizer.pre_tokenizer!r} {self._tokenizer.normalizer!r}"
        if "ByteLevel" not in parts or "add_prefix_space=True" in parts or "Prepend" in parts:
            return False
        name = next(iter(self._ids))
        samples = [sample.format(name) for sample in _SAMPLES]
        return [self.ids(self._look_up(each)) for each in samples] == self._encode(samples)
