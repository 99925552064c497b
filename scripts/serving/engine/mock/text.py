"""The answers of the mock engine: words that follow from the prompt alone.

A token depends on the prompt, its position in the answer and the request's seed. So an answer is
the same on every worker, in every batch, after a preemption, and when another worker continues it.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

from tokenizers import Tokenizer
from xxhash import xxh3_64_intdigest

from serving.errors import ModelError
from serving.protocol import TokenLogprob

_MAX_CANDIDATES = 4096
_STRIDE, _MIX, _MASK = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 2**64 - 1
_LOGPROB, _LOGPROB_DROP = -0.5, 0.25
"""Of a chosen token, and how much less each alternative has."""


@lru_cache
def printable_ids(engine_dir: Path, vocab_size: int) -> tuple[int, ...]:
    """Ids below `vocab_size`, all over the vocabulary, that decode to visible ASCII by themselves.

    Raises ModelError when there is no such id. Instances of one process share the result.
    """
    path = engine_dir / "tokenizer.json"
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as exc:  # the library raises nothing narrower
        raise ModelError(
            f"{path} cannot be read: {exc}",
            remedy="run the serve target again: it rebuilds the engine",
        ) from exc
    special = set(tokenizer.get_added_tokens_decoder())
    size = min(vocab_size, tokenizer.get_vocab_size())
    ids = [i for i in range(0, size, max(1, size // _MAX_CANDIDATES)) if i not in special]
    texts = tokenizer.decode_batch([[i] for i in ids])
    found = tuple(i for i, text in zip(ids, texts, strict=True) if _is_visible(text))
    if not found:
        raise ModelError(
            f"{path} has no tokens that are text by themselves",
            remedy="set `model.tokenizer: bundled`",
        )
    return found


class MockText:
    """Chooses tokens among `ids`."""

    def __init__(self, ids: Sequence[int]) -> None:
        self._ids = ids

    def seed(self, prompt: Sequence[int], seed: int | None) -> int:
        """The 64 bits that decide a whole answer."""
        return xxh3_64_intdigest(array("I", prompt).tobytes(), seed=(seed or 0) & _MASK)

    def token(self, seed: int, position: int) -> int:
        """The answer's token at `position`, from 0."""
        mixed = (seed + (position + 1) * _STRIDE) & _MASK
        mixed = ((mixed ^ (mixed >> 30)) * _MIX) & _MASK
        return self._ids[(mixed >> 32) % len(self._ids)]

    def logprob(self, token: int, num_top: int) -> TokenLogprob:
        """A made-up probability of `token`, and `num_top` alternatives, itself the first."""
        others = (i for i in self._ids if i != token)
        top = [(token, _LOGPROB)] if num_top else []
        top += [
            (other, _LOGPROB - _LOGPROB_DROP * rank)
            for rank, other in zip(range(1, num_top), others, strict=False)
        ]
        return TokenLogprob(token, _LOGPROB, top)


def _is_visible(text: str) -> bool:
    return text.isascii() and text.isprintable() and not text.isspace() and text != ""
