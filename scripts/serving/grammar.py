"""Guided decoding: which tokens may come next, by a JSON schema, expression or grammar.

llguidance compiles a `Guide` for the model's tokenizer. Then it finds, for every position, the
tokens that continue a valid text. The frontend compiles a guide to check it, the engine to use it.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer

from serving.errors import InvalidRequest, ModelError
from serving.model_folder import eos_token_ids, model_vocab_size
from serving.protocol import Guide

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

Words = npt.NDArray[np.uint32]

_NAMES = {
    "json_schema": "JSON schema",
    "regex": "regular expression",
    "grammar": "grammar",
}
# Without a bound, a model in doubt can write white space to the end of its context.
_WHITE_SPACE = r"[\x20\x0A\x0D\x09]{1,20}"
_NUM_KEPT = 64
_MAX_MESSAGE_CHARS = 300


class Grammars:
    """Compiles guides for the tokenizer in `folder`, and keeps the latest. Thread-safe.

    Making one is cheap: the tokenizer is read with the first guide, which takes up to a second.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._lock = threading.Lock()
        self._tokenizer: LLTokenizer | None = None
        self._end_ids: tuple[int, ...] = ()
        self._compiled: OrderedDict[Guide, LLMatcher] = OrderedDict()

    def matcher(self, guide: Guide, *, param: str | None = None) -> Matcher:
        """A matcher at the beginning of a text. Takes a millisecond, for huge guides up to a second.

        Raises InvalidRequest, which names `param`, when the guide does not compile or the model's
        tokenizer cannot be used.
        """
        with self._lock:
            compiled = self._compiled.get(guide)
            if compiled is None:
                compiled = self._compiled[guide] = self._compile(guide, param)
                if len(self._compiled) > _NUM_KEPT:
                    self._compiled.popitem(last=False)
            self._compiled.move_to_end(guide)
            assert self._tokenizer is not None, "compiling loads the tokenizer"
            num_words = (self._tokenizer.vocab_size + 31) // 32
            return Matcher(compiled.deep_copy(), num_words, self._end_ids)

    def _compile(self, guide: Guide, param: str | None) -> LLMatcher:
        from llguidance import LLMatcher

        tokenizer = self._load_tokenizer(param)
        try:
            match guide.kind:
                case "json_schema":
                    grammar = LLMatcher.grammar_from_json_schema(
                        guide.text, defaults={"whitespace_pattern": _WHITE_SPACE}
                    )
                case "regex":
                    grammar = LLMatcher.grammar_from_regex(guide.text)
                case "grammar":
                    grammar = LLMatcher.grammar_from_lark(guide.text)
            matcher = LLMatcher(tokenizer, grammar, log_level=0)
        except ValueError as exc:
            raise _not_compiled(guide, str(exc), param) from exc
        if matcher.is_error():
            raise _not_compiled(guide, matcher.get_error(), param)
        return matcher

    def _load_tokenizer(self, param: str | None) -> LLTokenizer:
        if self._tokenizer is not None:
            return self._tokenizer
        from llguidance import LLTokenizer

        file = self._folder / "tokenizer.json"
        try:
            tokenizer = Tokenizer.from_file(str(file))
            tokenizer.no_truncation()
            tokenizer.no_padding()
            self._end_ids = eos_token_ids(self._folder, tokenizer)
            num_tokens = 1 + max(tokenizer.get_vocab(with_added_tokens=True).values())
            num_tokens = max(num_tokens, model_vocab_size(self._folder))
            if not self._end_ids:
                raise ModelError("it names no end-of-sequence token")
            self._tokenizer = LLTokenizer(
                tokenizer.to_str(), n_vocab=num_tokens, eos_token=list(self._end_ids)
            )
        except Exception as exc:  # the Rust libraries raise nothing narrower
            raise InvalidRequest(
                f"Guided decoding cannot use this model's tokenizer: {_first_line(str(exc))}",
                param=param,
                code="unsupported_parameter",
            ) from exc
        return self._tokenizer


class Matcher:
    """The position of a text in its grammar. Used by one thread at a time.

    `error` is set once a token did not match; `is_complete` once no token can follow.
    """

    def __init__(self, matcher: LLMatcher, num_words: int, end_ids: tuple[int, ...]) -> None:
        self._matcher, self._end_ids = matcher, end_ids
        self.num_words = num_words
        self.error = ""
        self.is_complete = False

    def allow(self, words: Words, stop_ids: Iterable[int], *, may_end: bool) -> None:
        """Set the bits of the tokens that may come next, and clear all others.

        `words` is `[num_words]`, contiguous, token `i` being bit `i % 32` of word `i // 32`. The
        text may end, by any of `stop_ids`, only where the grammar accepts it, and where it
        `may_end` unless it must.
        """
        self._matcher.unsafe_compute_mask_ptr(words.ctypes.data, words.nbytes)
        stops = [token for token in stop_ids if token < 32 * len(words)]
        if self._matcher.is_accepting() and may_end:
            _set(words, stops)
            return
        before = words.copy()
        for token in (*stops, *self._end_ids):
            words[token // 32] &= ~np.uint32(1 << token % 32)
        if not words.any():
            # Only an end can follow, or the grammar wants a token that also is a stop token.
            words[:] = before
            if self._matcher.is_accepting():
                _set(words, stops)

    def accept(self, tokens: list[int]) -> None:
        """Append `tokens` to the text."""
        if self.error:
            return
        if not self._matcher.consume_tokens(tokens):
            self.error = _first_line(self._matcher.get_error())
        self.is_complete = self._matcher.is_stopped()


def _set(words: Words, tokens: Iterable[int]) -> None:
    for token in tokens:
        words[token // 32] |= np.uint32(1 << token % 32)


def _not_compiled(guide: Guide, why: str, param: str | None) -> InvalidRequest:
    return InvalidRequest(
        f"The {_NAMES[guide.kind]} cannot be used: {_first_line(why)}",
        param=param,
        code="invalid_grammar",
    )


def _first_line(message: str) -> str:
    """The message without the parser's state, which llguidance appends."""
    message = message.split("<state>")[0].strip()
    return " ".join(message.split())[:_MAX_MESSAGE_CHARS]
