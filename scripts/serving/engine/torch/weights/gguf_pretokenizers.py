"""How byte-level tokenizers cut text into words, by the name that GGUF has for it.

A GGUF file holds tokens and merges but not the pattern: `tokenizer.ggml.pre` names it. The patterns
here are those of the models' own tokenizer.json. A name that is not here is refused, because another
pattern gives other tokens without any error.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tokenizers import pre_tokenizers


@dataclass(frozen=True)
class WordRule:
    """`patterns`: each one cuts what the ones before it left; none: GPT-2's own.

    `ignore_merges`: a word that is a token stays whole. `add_bos` holds where the file does not say.
    """

    patterns: tuple[str, ...] = ()
    single_digits: bool = False
    nfc: bool = False
    ignore_merges: bool = False
    add_bos: bool = False

    def pre_tokenizer(self) -> pre_tokenizers.PreTokenizer:
        from tokenizers import Regex, pre_tokenizers

        parts: list[Any] = [
            pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in self.patterns
        ]
        if self.single_digits:
            parts.append(pre_tokenizers.Digits(individual_digits=True))
        parts.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=not self.patterns))
        return pre_tokenizers.Sequence(parts)


_CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"


def _words(digits: str) -> str:
    """cl100k's words; `digits` is a pattern for what is kept together of a number."""
    return (
        rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|{digits}"
        rf"| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_SPACES}"
    )


def _cased_words(digits: str, suffix: str = "") -> str:
    """o200k's words, which end where a capital follows a small letter."""
    start = r"[^\r\n\p{L}\p{N}]?"
    return (
        rf"{start}{_UPPER}*{_LOWER}+{suffix}|{start}{_UPPER}+{_LOWER}*{suffix}|{digits}"
        rf"| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_SPACES}"
    )


_UP_TO_3, _SINGLE = r"\p{N}{1,3}", r"\p{N}"
_LLAMA3 = WordRule((_words(_UP_TO_3),), ignore_merges=True, add_bos=True)
_GPT2 = WordRule()
_QWEN35 = (
    rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}\p{{M}}]+|{_SINGLE}"
    rf"| ?[^\s\p{{L}}\p{{M}}\p{{N}}]+[\r\n]*|{_SPACES}"
)
_DEEPSEEK_V3 = (
    _UP_TO_3,
    "[一-龥぀-ゟ゠-ヿ]+",
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
    rf"| ?[\p{{P}}\p{{S}}]+[\r\n]*|{_SPACES}",
)

WORD_RULES = {
    "gpt-2": _GPT2,
    "phi-2": _GPT2,
    "smollm": WordRule(single_digits=True),
    "llama-bpe": _LLAMA3,
    "llama3": _LLAMA3,
    "llama-v3": _LLAMA3,
    "qwen2": WordRule((_words(_SINGLE),), nfc=True),
    "qwen35": WordRule((_QWEN35,), nfc=True),
    "gpt-4o": WordRule((_cased_words(_UP_TO_3, f"{_CONTRACTIONS}?"),), ignore_merges=True),
    "tekken": WordRule((_cased_words(_SINGLE),), ignore_merges=True, add_bos=True),
    "deepseek-v3": WordRule(_DEEPSEEK_V3),
}
"""Names of `tokenizer.ggml.pre`."""
