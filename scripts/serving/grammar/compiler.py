"""From a `Guide` to a matcher of llguidance, for one model's tokenizer.

What this refuses is the caller's to change. It bounds what a compiled guide may cost per token, but
neither the time nor the stack of compiling: see `check`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from tokenizers import Tokenizer

from serving.errors import InvalidRequest, ModelError
from serving.grammar.ebnf import as_lark
from serving.grammar.schema import TIGHT, without_unknown_formats
from serving.grammar.structural_tags import structural_tag_grammar
from serving.model_folder import eos_token_ids, model_vocab_size
from serving.protocol import Guide

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

CODE = "invalid_grammar"
_NAMES = {
    "json_schema": "JSON schema",
    "regex": "regular expression",
    "grammar": "grammar",
    "structural_tag": "structural tag",
}
# Fuel is work: about 15 ms of a core for a token's mask. A state of the lexer is about 2 kB.
_LIMITS: dict[str, Any] = {
    "initial_lexer_fuel": 1_000_000,
    "step_lexer_fuel": 200_000,
    "step_max_items": 50_000,
    "max_lexer_states": 50_000,
    "verbose_errors": False,
}
_MAX_MESSAGE_CHARS = 300
_NOTHING_FITS = ("NoExtension", "NoExtensionBias")


class GuideCompiler:
    """Compiles guides for the tokenizer in `folder`. Used by one thread at a time.

    The tokenizer is read with the first guide, which takes up to a second.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._tokenizer: LLTokenizer | None = None
        self._special_tokens: dict[str, int] = {}
        self.end_ids: tuple[int, ...] = ()

    @property
    def num_words(self) -> int:
        """32-bit words of a mask of the vocabulary. Needs the tokenizer."""
        assert self._tokenizer is not None, "nothing was compiled yet"
        return (int(self._tokenizer.vocab_size) + 31) // 32

    def compile(self, guide: Guide) -> LLMatcher:
        """A matcher at the beginning of a text, from which the first token's mask was computed.

        Raises InvalidRequest for a guide that does not compile or that nothing can fit.
        """
        from llguidance import LLMatcher
        from llguidance._lib import LLParserLimits

        tokenizer = self.load_tokenizer()
        try:
            grammar = self._grammar(guide)
            matcher = LLMatcher(tokenizer, grammar, log_level=0, limits=LLParserLimits(**_LIMITS))
        except InvalidRequest:
            raise
        except RecursionError as exc:
            raise not_usable(guide, "it is nested too deeply") from exc
        except ValueError as exc:
            raise not_usable(guide, first_line(str(exc))) from exc
        if matcher.is_error():
            raise not_usable(guide, first_line(matcher.get_error()))
        first = matcher.deep_copy()
        words = np.zeros(self.num_words, dtype=np.uint32)
        first.unsafe_compute_mask_ptr(words.ctypes.data, words.nbytes)
        if first.is_error():
            raise not_usable(guide, first_line(first.get_error()))
        return matcher

    def _grammar(self, guide: Guide) -> str:
        from llguidance import LLMatcher

        match guide.kind:
            case "json_schema":
                schema = without_unknown_formats(json.loads(guide.text))
                options: Any = TIGHT
                return str(LLMatcher.grammar_from_json_schema(json.dumps(schema), options))
            case "regex":
                return str(LLMatcher.grammar_from_regex(guide.text))
            case "grammar":
                return str(LLMatcher.grammar_from_lark(as_lark(guide.text)))
            case "structural_tag":
                lark = structural_tag_grammar(json.loads(guide.text), self._special_tokens)
                return str(LLMatcher.grammar_from_lark(lark))

    def load_tokenizer(self) -> LLTokenizer:
        """Raises InvalidRequest when llguidance cannot use it."""
        if self._tokenizer is not None:
            return self._tokenizer
        from llguidance import LLTokenizer

        file = self._folder / "tokenizer.json"
        try:
            tokenizer = Tokenizer.from_file(str(file))
            tokenizer.no_truncation()
            tokenizer.no_padding()
            self.end_ids = eos_token_ids(self._folder, tokenizer)
            num_tokens = 1 + max(tokenizer.get_vocab(with_added_tokens=True).values())
            num_tokens = max(num_tokens, model_vocab_size(self._folder))
            if not self.end_ids:
                raise ModelError("it names no end-of-sequence token")
            self._special_tokens = {
                added.content: token
                for token, added in tokenizer.get_added_tokens_decoder().items()
                if added.special
            }
            self._tokenizer = LLTokenizer(
                tokenizer.to_str(), n_vocab=num_tokens, eos_token=list(self.end_ids)
            )
        except Exception as exc:  # the Rust libraries raise nothing narrower
            raise InvalidRequest(
                f"Guided decoding cannot use this model's tokenizer: {first_line(str(exc))}",
                code="unsupported_parameter",
            ) from exc
        return self._tokenizer


def not_usable(guide: Guide, why: str) -> InvalidRequest:
    """The caller's error."""
    return InvalidRequest(f"The {_NAMES[guide.kind]} cannot be used: {why}", code=CODE)


def first_line(message: str) -> str:
    """The message without the parser's state, which llguidance appends."""
    message = message.split("<state>")[0].split("<non-verbose/>")[0].strip()
    if message in _NOTHING_FITS:
        return "there is a place at which nothing can follow"
    return " ".join(message.split())[:_MAX_MESSAGE_CHARS]
