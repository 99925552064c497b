"""The text and bytes of single tokens, and token ids to text as they come.

A byte-level or byte-fallback tokenizer gives each token's bytes, and UTF-8 says where a character
is complete. So a replacement character that the model wrote is never taken for half a character.
Any other tokenizer is decoded by the library's stream.
"""

from __future__ import annotations

import codecs
from collections.abc import Mapping, Sequence
from typing import Protocol

from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream

SEED_TOKENS = 8
"""Prompt tokens that give the first new token its context (a leading space, a split character)."""

MAX_UNDECODED_TOKENS = 16
"""A character has at most four bytes: tokens that make no text for longer are not UTF-8."""

REPLACEMENT = "\ufffd"


class TokenText:
    """The text and bytes of single tokens of one tokenizer. Shared by all its requests."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        added = tokenizer.get_added_tokens_decoder()
        self._added = {token_id: token.content for token_id, token in added.items()}
        self.special_ids = frozenset(i for i, token in added.items() if token.special)
        decoder = repr(tokenizer.decoder)
        self._bytes_of = _byte_alphabet() if "ByteLevel" in decoder else None
        self.has_bytes = self._bytes_of is not None or "ByteFallback" in decoder
        """Whether the text of tokens is the text of their bytes."""
        self.known: dict[int, tuple[str, bytes]] = {}
        """Tokens that were asked for before."""

    def __call__(self, token_id: int) -> tuple[str, bytes]:
        """A token that is part of a character has replacement characters and its true bytes."""
        known = self.known.get(token_id)
        if known is None:
            data = self._token_bytes(token_id)
            known = self.known[token_id] = data.decode("utf-8", "replace"), data
        return known

    def _token_bytes(self, token_id: int) -> bytes:
        if token_id in self._added:
            return self._added[token_id].encode()
        token = self.tokenizer.id_to_token(token_id)
        if token is None:  # an id of the padded embedding
            return b""
        if self._bytes_of is not None and all(char in self._bytes_of for char in token):
            return bytes(self._bytes_of[char] for char in token)
        if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
            return bytes.fromhex(token[3:5])
        text: str = token.replace("\u2581", " ")
        return text.encode()


def _byte_alphabet() -> dict[str, int]:
    """Byte-level BPE's printable stand-ins: character to byte (GPT-2's table)."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    alphabet = {chr(byte): byte for byte in printable}
    alphabet.update({chr(256 + index): byte for index, byte in enumerate(others)})
    return alphabet


class TokenDecoder(Protocol):
    """Token ids of one sequence to text."""

    def step(self, token_id: int) -> str:
        """Text completed by this token."""

    def flush(self) -> str:
        """What is left at the end, without an incomplete last character."""


def token_decoder(
    tokens: TokenText,
    prompt_token_ids: Sequence[int],
    *,
    skip_special_tokens: bool,
    kept: Sequence[str] = (),
) -> TokenDecoder:
    """For the tokens that follow a prompt. `kept` are special tokens that are not skipped."""
    kept_ids: dict[int, str] = {}
    if skip_special_tokens:
        ids = {name: tokens.tokenizer.token_to_id(name) for name in kept}
        kept_ids = {i: name for name, i in ids.items() if i in tokens.special_ids}
    # Without a prompt, the first token of a text may lose its leading space.
    if tokens.has_bytes and prompt_token_ids:
        skipped = tokens.special_ids - kept_ids.keys() if skip_special_tokens else frozenset()
        return _ByteDecoder(tokens, prompt_token_ids, skipped)
    return _StreamDecoder(tokens.tokenizer, prompt_token_ids, skip_special_tokens, kept_ids)


class _ByteDecoder:
    """UTF-8 of the tokens' bytes; what is not UTF-8 becomes replacement characters."""

    def __init__(
        self, tokens: TokenText, prompt_token_ids: Sequence[int], skipped: frozenset[int]
    ) -> None:
        self._tokens, self._skipped = tokens, skipped
        self._known = tokens.known
        self._decode = codecs.getincrementaldecoder("utf-8")("replace").decode
        # A prompt of token ids may end inside a character: that one belongs to the new text.
        for token_id in prompt_token_ids[-SEED_TOKENS:]:
            self._decode(tokens(token_id)[1])

    def step(self, token_id: int) -> str:
        if token_id in self._skipped:
            return ""
        known = self._known.get(token_id)
        return self._decode(known[1] if known is not None else self._tokens(token_id)[1])

    def flush(self) -> str:
        return ""


class _StreamDecoder:
    """`DecodeStream` with a context and an end. It waits a while for bytes to become UTF-8."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        prompt_token_ids: Sequence[int],
        skip_special_tokens: bool,
        kept: Mapping[int, str],
    ) -> None:
        self._tokenizer, self._skip, self._kept = tokenizer, skip_special_tokens, kept
        self._context = list(prompt_token_ids[-SEED_TOKENS:])
        # A prompt of token ids may end inside a character: that one belongs to the new text.
        clean = len(self._context)
        while clean and self._decode(self._context[:clean]).endswith(REPLACEMENT):
            clean -= 1
        self._pending = self._context[clean:]
        del self._context[clean:]
        self._stream = self._new_stream(self._context)
        for token_id in self._pending:
            self._stream.step(tokenizer, token_id)

    def step(self, token_id: int) -> str:
        if token_id in self._kept:
            rest = self._undecoded() if self._pending else ""
            self._context, self._pending = [], []
            self._stream = self._new_stream([])
            return rest + self._kept[token_id]
        self._pending.append(token_id)
        try:
            text = self._stream.step(self._tokenizer, token_id)
        except Exception as exc:  # the Rust library raises nothing narrower
            if "nvalid prefix" not in str(exc):
                raise
            return self._resume()
        if text is None:
            return self._resume() if len(self._pending) > MAX_UNDECODED_TOKENS else ""
        self._context, self._pending = self._pending, []
        return text

    def flush(self) -> str:
        return self._undecoded().rstrip(REPLACEMENT) if self._pending else ""

    def _resume(self) -> str:
        """Return what there is, invalid bytes replaced, since no clean boundary came."""
        text = self._undecoded()
        if text:  # else only special tokens were skipped: the context is still the last text
            self._context = [] if text.endswith(REPLACEMENT) else self._pending
        self._pending = []
        self._stream = self._new_stream(self._context)
        return text

    def _undecoded(self) -> str:
        context = self._decode(self._context)
        text = self._decode(self._context + self._pending)
        return text[len(context) :] if text.startswith(context) else self._decode(self._pending)

    def _decode(self, token_ids: Sequence[int]) -> str:
        text: str = self._tokenizer.decode(token_ids, skip_special_tokens=self._skip)
        return text

    def _new_stream(self, seed: Sequence[int]) -> DecodeStream:
        return DecodeStream(ids=list(seed), skip_special_tokens=self._skip)
