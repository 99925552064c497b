"""Pieces that are remembered give the ids that the whole text gives."""

import random
from pathlib import Path

from serving.text.segment_cache import SegmentCache
from tokenizers import AddedToken, Tokenizer
from unit.frontend.fakes import write_tokenizer


def tokenizer(folder: Path) -> Tokenizer:
    return Tokenizer.from_file(str(write_tokenizer(folder) / "tokenizer.json"))


def test_ids_are_those_of_the_whole_text(tmp_path: Path) -> None:
    whole = tokenizer(tmp_path)
    cache = SegmentCache(whole, max_chars=40_000)
    assert cache.is_usable
    rng = random.Random(0)
    words = ["the quick", " brown", "\n\n", "żółć 🙂", "  ", "<|im_start|>", "<|im_end|>", "<|im_"]
    blocks = ["".join(rng.choices(words, k=600)) for _ in range(12)]
    for _ in range(60):
        text = "<|im_start|>".join(rng.choices(blocks, k=rng.randint(1, 5)))
        assert cache.encode(text) == whole.encode(text, add_special_tokens=False).ids


def test_repeated_prompt_is_not_encoded_again(tmp_path: Path) -> None:
    class Counting:
        """Counts the characters that reach the tokenizer."""

        def __init__(self, inner: Tokenizer) -> None:
            self._inner, self.num_chars = inner, 0

        def encode_batch_fast(self, texts: list[str], **options: bool) -> object:
            self.num_chars += sum(map(len, texts))
            return self._inner.encode_batch_fast(texts, **options)

        def __getattr__(self, name: str) -> object:
            return getattr(self._inner, name)

    counting = Counting(tokenizer(tmp_path))
    cache = SegmentCache(counting)  # type: ignore[arg-type]
    history = "<|im_start|>system\n" + "be brief " * 1000 + "<|im_end|>\n"
    first = cache.encode(history + "<|im_start|>user\nhello")
    before = counting.num_chars
    second = cache.encode(history + "<|im_start|>user\nhello again")
    assert counting.num_chars - before < 100
    assert second[: len(first) - 5] == first[:-5]


def test_memory_of_pieces_is_bounded(tmp_path: Path) -> None:
    cache = SegmentCache(tokenizer(tmp_path), max_chars=10_000)
    for i in range(50):
        cache.encode(f"<|im_start|>{i} " + "word " * 800)
    assert cache._num_chars <= 10_000
    assert sum(map(len, cache._known)) < cache._num_chars


def test_tokenizer_whose_pieces_depend_on_each_other_encodes_whole(tmp_path: Path) -> None:
    absorbing = tokenizer(tmp_path)
    absorbing.add_special_tokens([AddedToken("<|x|>", lstrip=True, special=True)])
    assert not SegmentCache(absorbing).is_usable
