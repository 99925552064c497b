"""The tokenizer inside a GGUF file, made into the tokenizer.json that the model was published with.

There are two kinds. Byte-level ones (`gpt2`) hold tokens and merges. SentencePiece ones (`llama`,
and `gemma4`, which has its merges) hold tokens with scores; their merges follow from the scores. A
tokenizer that is not known to come out exactly is refused: wrong tokens look like a bad model.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import IntEnum
from pathlib import Path
from typing import TYPE_CHECKING, Any

from msgspec import Struct

from serving.engine.torch.weights.gguf_pretokenizers import WORD_RULES, WordRule
from serving.errors import ModelError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

_REMEDY = "use the model's original repository or folder with safetensors"
_PIECES = {"llama", "gemma4"}  # the models whose tokens are pieces of SentencePiece
_SPACE = "▁"

_SPECIAL_NAMES = {
    "bos": "bos_token",
    "eos": "eos_token",
    "unknown": "unk_token",
    "padding": "pad_token",
}

Metadata = dict[str, Any]


class TokenType(IntEnum):
    """`tokenizer.ggml.token_type`."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


class GgufTokens(Struct, frozen=True):
    """The lists of a file; `scores` and `merges` are empty where it has none."""

    tokens: list[str]
    types: list[int]
    scores: list[float]
    merges: list[str]


def read_metadata(path: Path) -> Metadata:
    """The metadata of a GGUF file, without its token and merge lists.

    Raises ModelError when the file is cut short or otherwise no GGUF.
    """
    from gguf import GGUFReader

    try:
        fields = GGUFReader(path).fields
    except (ValueError, IndexError, KeyError) as exc:
        raise ModelError(
            f"{path} is damaged or incomplete: {exc}", remedy="download it again"
        ) from exc
    return {
        key: field.contents()
        for key, field in fields.items()
        if key.startswith(("general.", "tokenizer.")) and len(field.data) == 1
    }


def require_exact(metadata: Metadata) -> None:
    """Raises ModelError for a tokenizer that is not known to convert exactly."""
    model = metadata.get("tokenizer.ggml.model")
    if model in _PIECES:
        return
    kind = _word_rule_name(metadata)
    if metadata.get("general.architecture") == "phi3":
        # Some of its special tokens swallow the spaces after them, and the file does not say which.
        kind = f"{kind}, of a Phi model"
    elif model == "gpt2" and kind in WORD_RULES:
        return
    if model != "gpt2":
        what = f"`tokenizer.ggml.model: {model}`"
    elif kind is None:
        what = "it does not say `tokenizer.ggml.pre`"
    else:
        what = f"`tokenizer.ggml.pre: {kind}`"
    raise ModelError(
        f"the tokenizer in this GGUF file cannot be converted exactly: {what}", remedy=_REMEDY
    )


def _word_rule_name(metadata: Metadata) -> str | None:
    """Files from before May 2024 do not say it: only GPT-2 itself is certain then."""
    is_gpt2 = metadata.get("general.architecture") == "gpt2"
    name: str | None = metadata.get("tokenizer.ggml.pre", "gpt-2" if is_gpt2 else None)
    return name


def save(path: Path, target: Path, model_max_len: int) -> None:
    """Write the tokenizer of the GGUF file at `path` to the folder `target`. Raises ModelError."""
    from transformers import PreTrainedTokenizerFast

    metadata = read_metadata(path)
    require_exact(metadata)
    vocabulary = _read_vocabulary(path)
    names: dict[str, str] = {}
    for key, name in _SPECIAL_NAMES.items():
        token_id = metadata.get(f"tokenizer.ggml.{key}_token_id")
        if token_id is not None and token_id < len(vocabulary.tokens):
            names[name] = vocabulary.tokens[token_id]
    made: Any = PreTrainedTokenizerFast
    made(
        tokenizer_object=tokenizer_of(vocabulary, metadata),
        model_max_length=model_max_len,
        clean_up_tokenization_spaces=False,  # it would eat spaces before punctuation
        chat_template=metadata.get("tokenizer.chat_template"),
        **names,
    ).save_pretrained(target)


def _read_vocabulary(path: Path) -> GgufTokens:
    from gguf import GGUFReader

    fields = GGUFReader(path).fields

    def values(name: str) -> list[Any]:
        field = fields.get(f"tokenizer.ggml.{name}")
        return [] if field is None else list(field.contents())

    tokens = values("tokens")
    types = values("token_type") or [TokenType.NORMAL] * len(tokens)
    if len(types) != len(tokens):
        raise ModelError(
            f"{path.name} has {len(tokens)} tokens and {len(types)} types of them", remedy=_REMEDY
        )
    return GgufTokens(tokens, types, values("scores"), values("merges"))


def tokenizer_of(vocabulary: GgufTokens, metadata: Metadata) -> Tokenizer:
    """Raises ModelError when the lists do not make a tokenizer."""
    from tokenizers import processors

    is_pieces = metadata.get("tokenizer.ggml.model") in _PIECES
    if is_pieces:
        tokenizer, add_bos = _of_pieces(vocabulary, metadata), True
    else:
        rule = WORD_RULES[str(_word_rule_name(metadata))]
        tokenizer, add_bos = _of_bytes(vocabulary, rule), rule.add_bos
    ends = []
    for key, default in (("bos", add_bos), ("eos", False)):
        token_id = metadata.get(f"tokenizer.ggml.{key}_token_id")
        wanted = metadata.get(f"tokenizer.ggml.add_{key}_token", default)
        ends.append((vocabulary.tokens[token_id], token_id) if wanted and token_id else None)
    if special := [end for end in ends if end is not None]:
        before, after = ([end[0]] if end else [] for end in ends)
        tokenizer.post_processor = processors.TemplateProcessing(
            single=[*before, "$A", *after],
            pair=[*before, "$A", *after, *(f"{token}:1" for token in before), "$B:1"],
            special_tokens=special,
        )
    return tokenizer


# --- byte-level tokenizers ------------------------------------------------------------------------


def _of_bytes(vocabulary: GgufTokens, rule: WordRule) -> Tokenizer:
    from tokenizers import Tokenizer, decoders, models, normalizers

    merges = [_split_merge(merge) for merge in vocabulary.merges]
    model = models.BPE(
        vocab=_ids_of(vocabulary.tokens), merges=merges, ignore_merges=rule.ignore_merges
    )
    tokenizer = Tokenizer(model)
    if rule.nfc:
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = rule.pre_tokenizer()
    tokenizer.decoder = decoders.ByteLevel()
    _add_special(tokenizer, vocabulary, vocabulary.tokens)
    return tokenizer


def _split_merge(merge: str) -> tuple[str, str]:
    left, _, right = merge.partition(" ")
    return left, right


def _ids_of(tokens: Sequence[str]) -> dict[str, int]:
    ids = {token: index for index, token in enumerate(tokens)}
    if len(ids) != len(tokens):
        twice = next(token for index, token in enumerate(tokens) if ids[token] != index)
        raise ModelError(
            f"the vocabulary of this GGUF file has the token {twice!r} twice", remedy=_REMEDY
        )
    return ids


def _add_special(
    tokenizer: Tokenizer, vocabulary: GgufTokens, names: Sequence[str], *, eats_spaces: bool = False
) -> None:
    """Tokens that are cut out of a text before anything else. `names` are as they stand in it."""
    from tokenizers import AddedToken

    hidden = {TokenType.CONTROL, TokenType.UNKNOWN}
    kept = {"<unk>", "<s>", "<|endoftext|>"}  # of Phi-3's tokens, these do not eat spaces
    for kind, name in zip(vocabulary.types, names, strict=True):
        rstrip = eats_spaces and name not in kept
        added = AddedToken(name, rstrip=rstrip, normalized=False, special=kind in hidden)
        if kind in hidden:
            tokenizer.add_special_tokens([added])
        elif kind == TokenType.USER_DEFINED:
            tokenizer.add_tokens([added])


# --- SentencePiece tokenizers ---------------------------------------------------------------------


def _of_pieces(vocabulary: GgufTokens, metadata: Metadata) -> Tokenizer:
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers

    architecture = str(metadata.get("general.architecture"))
    is_gemma = architecture.startswith("gemma")
    pieces = [token.replace(" ", _SPACE) for token in vocabulary.tokens]
    ids = _ids_of(pieces)
    merges: list[tuple[str, str]]
    if vocabulary.merges:
        merges = [_split_merge(merge) for merge in vocabulary.merges]
    else:
        merges = _merges_of(vocabulary, pieces, ids)
    unknown = metadata.get("tokenizer.ggml.unknown_token_id", 0)
    model = models.BPE(
        vocab=ids, merges=merges, unk_token=pieces[unknown], fuse_unk=True, byte_fallback=True
    )
    tokenizer = Tokenizer(model)
    prefix = metadata.get("tokenizer.ggml.add_space_prefix", not is_gemma)
    replace = normalizers.Replace(" ", _SPACE)
    back: list[Any] = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if not prefix:
        tokenizer.normalizer = replace
    elif "[INST]" in ids and vocabulary.types[ids["[INST]"]] == TokenType.CONTROL:
        # Mistral from v0.3 on: only the start of a text gets a space, not every stretch of it.
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(
            replacement=_SPACE, prepend_scheme="first", split=False
        )
    else:
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(_SPACE), replace])
    tokenizer.decoder = decoders.Sequence([*back, decoders.Strip(" ", 1, 0)] if prefix else back)
    _add_special(tokenizer, vocabulary, pieces, eats_spaces=architecture == "phi3")
    return tokenizer


def _merges_of(
    vocabulary: GgufTokens, pieces: Sequence[str], ids: dict[str, int]
) -> list[tuple[str, str]]:
    """Every split of a piece into two pieces, best first, as tokenizer.json files list them.

    What users defined comes first, whatever score the file gives it: SentencePiece never cuts it.
    """
    if len(vocabulary.scores) != len(pieces):
        raise ModelError(
            f"this GGUF file has {len(pieces)} tokens and {len(vocabulary.scores)} scores",
            remedy=_REMEDY,
        )
    wholes = {TokenType.NORMAL, TokenType.USER_DEFINED, TokenType.CONTROL}
    found: list[tuple[float, str, str]] = []
    for piece, kind, score in zip(pieces, vocabulary.types, vocabulary.scores, strict=True):
        if kind not in wholes:
            continue
        rank = score if kind == TokenType.NORMAL else 0.0
        splits = [(piece[:at], piece[at:]) for at in range(1, len(piece))]
        known = [(left, right) for left, right in splits if left in ids and right in ids]
        known.sort(key=lambda pair: (ids[pair[0]], ids[pair[1]]))
        found += [(rank, left, right) for left, right in known]
    found.sort(key=lambda each: (each[0], len(each[1]), len(each[2])), reverse=True)
    return [(left, right) for _, left, right in found]
