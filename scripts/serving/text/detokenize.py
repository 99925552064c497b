"""Token ids to text, as they arrive: whole characters only, and no part of a stop string.

Text is held back in two cases: while its last character is incomplete, and while its end could be
the beginning of a stop string.
"""

from __future__ import annotations

from collections.abc import Sequence

from msgspec import Struct
from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream

from serving.protocol import EngineOutput, FinishReason, TokenLogprob
from serving.text.preprocess import PreparedRequest

SEED_TOKENS = 8
"""Prompt tokens that give the first new token its context: a leading space, a split character."""

MAX_UNDECODED_TOKENS = 16
"""A character has at most four bytes. More tokens than this without text are not UTF-8."""

REPLACEMENT = "\ufffd"


class Delta(Struct):
    """New text of one sample. Only the last delta has a `finish_reason`."""

    text: str = ""
    finish_reason: FinishReason | None = None
    logprobs: list[TokenLogprob] | None = None

    def __bool__(self) -> bool:
        return bool(self.text or self.logprobs or self.finish_reason)

    @classmethod
    def merged(cls, deltas: Sequence[Delta]) -> Delta:
        """One delta with the content of all `deltas`, in order."""
        if len(deltas) == 1:
            return deltas[0]
        logprobs = [entry for delta in deltas for entry in delta.logprobs or ()]
        text = "".join([delta.text for delta in deltas])
        return cls(text, deltas[-1].finish_reason, logprobs or None)


class Detokenizer:
    """The text of one sample. Once `finish_reason` is set, perhaps by a stop string, it is over."""

    def __init__(self, tokenizer: Tokenizer, prepared: PreparedRequest) -> None:
        self._decoder = _Decoder(tokenizer, prepared.token_ids, prepared.skip_special_tokens)
        self._stops = prepared.stop
        self._min_tokens = prepared.sampling.min_tokens
        self._held = ""
        self._released_chars = 0
        # (where its text begins, logprob) of tokens whose text is still held back
        self._held_logprobs: list[tuple[int, TokenLogprob]] = []
        self.num_tokens = 0
        self.finish_reason: FinishReason | None = None

    def feed_each(self, output: EngineOutput) -> list[Delta]:
        """One delta for each token of `output` that releases text."""
        if self._stops or output.logprobs is not None or self._held_logprobs:
            return [delta for piece in _by_token(output) if (delta := self.feed(piece))]
        step = self._decoder.step
        deltas = [Delta(text) for token_id in output.token_ids if (text := step(token_id))]
        self.num_tokens += len(output.token_ids)
        self._released_chars += sum([len(delta.text) for delta in deltas])
        if output.finish_reason is not None:
            tail = self._decoder.flush()
            self._released_chars += len(tail)
            self.finish_reason = output.finish_reason
            last = deltas.pop().text if deltas else ""
            deltas.append(Delta(last + tail, output.finish_reason))
        return deltas

    def feed(self, output: EngineOutput) -> Delta:
        """All text that `output` releases, perhaps none, as one delta."""
        if self.finish_reason is not None:
            return Delta()  # A stop string ended it; these tokens came with it.
        parts = []
        for position, token_id in enumerate(output.token_ids):
            self.num_tokens += 1
            if output.logprobs is not None:
                start = self._released_chars + len(self._held)
                self._held_logprobs.append((start, output.logprobs[position]))
            text = self._decoder.step(token_id)
            if text:
                parts.append(self._release(text))
                if self.finish_reason is not None:
                    return self._delta(parts)
        if output.finish_reason is not None:
            tail = self._decoder.flush()
            if tail:
                parts.append(self._release(tail))
            if self.finish_reason is None:  # The tail has no stop string either.
                parts.append(self._held)
                self._released_chars += len(self._held)
                self._held = ""
                self.finish_reason = output.finish_reason
        return self._delta(parts)

    def _release(self, text: str) -> str:
        """The text that can be shown after `text` is added. A stop string sets `finish_reason`."""
        if not self._stops or self.num_tokens <= self._min_tokens:
            self._released_chars += len(text)
            return text
        text = self._held + text
        end = _first_stop(text, self._stops)
        if end is None:
            end = len(text) - _held_chars(text, self._stops)
            self._held = text[end:]
        else:
            self._held = ""
            self.finish_reason = "stop"
        self._released_chars += end
        return text[:end]

    def _delta(self, parts: list[str]) -> Delta:
        return Delta("".join(parts), self.finish_reason, self._take_logprobs())

    def _take_logprobs(self) -> list[TokenLogprob] | None:
        """Those whose text begins in the released text. At a natural end, all of them."""
        held = self._held_logprobs
        if not held:
            return None
        count = len(held)
        if self._held or self.finish_reason == "stop":
            while count and held[count - 1][0] >= self._released_chars:
                count -= 1
        self._held_logprobs = held[count:]
        return [entry for _, entry in held[:count]] or None


def _by_token(output: EngineOutput) -> list[EngineOutput]:
    """One output for each token. The last one has the finish_reason."""
    ids, logprobs = output.token_ids, output.logprobs
    if len(ids) < 2:
        return [output]
    last = len(ids) - 1
    return [
        EngineOutput(
            output.request_id,
            [token_id],
            output.finish_reason if position == last else None,
            logprobs=None if logprobs is None else [logprobs[position]],
        )
        for position, token_id in enumerate(ids)
    ]


def _first_stop(text: str, stops: Sequence[str]) -> int | None:
    """The start of the stop string that is complete first."""
    found = [(start + len(stop), start) for stop in stops if (start := text.find(stop)) >= 0]
    return min(found)[1] if found else None


def _held_chars(text: str, stops: Sequence[str]) -> int:
    """Length of the longest end of `text` that is the beginning of a stop string."""
    longest = 0
    for stop in stops:
        start = max(0, len(text) - len(stop) + 1)
        while (start := text.find(stop[0], start)) >= 0:
            if stop.startswith(text[start:]):
                longest = max(longest, len(text) - start)
                break
            start += 1
    return longest


class _Decoder:
    """`DecodeStream` with a context, a flush at the end, and tolerance of invalid bytes."""

    def __init__(
        self, tokenizer: Tokenizer, prompt_token_ids: Sequence[int], skip_special_tokens: bool
    ) -> None:
        self._tokenizer, self._skip = tokenizer, skip_special_tokens
        self._context = list(prompt_token_ids[-SEED_TOKENS:])
        # A prompt of token ids may end inside a character. That character belongs to the new text.
        clean = len(self._context)
        while clean and self._decode(self._context[:clean]).endswith(REPLACEMENT):
            clean -= 1
        self._pending = self._context[clean:]
        del self._context[clean:]
        self._stream = self._new_stream(self._context)
        for token_id in self._pending:
            self._stream.step(tokenizer, token_id)

    def step(self, token_id: int) -> str:
        """The text that this token completes."""
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
        """The remaining text, without an incomplete last character."""
        return self._undecoded().rstrip(REPLACEMENT) if self._pending else ""

    def _resume(self) -> str:
        """Stop waiting for whole characters: release the text with invalid bytes replaced."""
        text = self._undecoded()
        if text:  # Without text, all were skipped special tokens, and the context remains.
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


class TokenText:
    """The text and bytes of single tokens, for logprobs."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._added = {i: t.content for i, t in tokenizer.get_added_tokens_decoder().items()}
        self._byte_alphabet = _byte_alphabet() if "ByteLevel" in repr(tokenizer.decoder) else None
        self._known: dict[int, tuple[str, bytes]] = {}

    def __call__(self, token_id: int) -> tuple[str, bytes]:
        """A token inside a character has replacement characters for text, and its true bytes."""
        known = self._known.get(token_id)
        if known is None:
            data = self._token_bytes(token_id)
            known = self._known[token_id] = data.decode("utf-8", "replace"), data
        return known

    def _token_bytes(self, token_id: int) -> bytes:
        if token_id in self._added:
            return self._added[token_id].encode()
        token = self._tokenizer.id_to_token(token_id)
        if token is None:  # an id of the padded embedding
            return b""
        if self._byte_alphabet is not None and all(char in self._byte_alphabet for char in token):
            return bytes(self._byte_alphabet[char] for char in token)
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
