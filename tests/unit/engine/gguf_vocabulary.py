"""Writes the tokenizer of a tokenizer.json as a GGUF file has it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
_LOOKS_SPECIAL = re.compile(r"<pad>|<mask>|<2mass>|\[@BOS@\]|<\|.*\|>|<｜.*｜>|<unused\d+>")
_BYTE_PIECE = re.compile(r"<0x[0-9A-F]{2}>")


def write_vocabulary(
    path: Path,
    original: Mapping[str, Any],
    *,
    model: str = "gpt2",
    architecture: str = "llama",
    metadata: Mapping[str, str | bool | int] | None = None,
) -> Path:
    """A file without weights. `original` is the content of a tokenizer.json.

    Scores of SentencePiece's pieces are their places in the list of merges; added tokens have a low
    one, and spaces where the original has U+2581.
    """
    pieces = {index: token for token, index in original["model"]["vocab"].items()}
    added = {each["id"]: each for each in original["added_tokens"]}
    merges = [
        tuple(merge.split(" ")) if isinstance(merge, str) else tuple(merge)
        for merge in original["model"]["merges"]
    ]
    ranks: dict[str, int] = {}
    for rank, (left, right) in enumerate(merges):
        ranks.setdefault(left + right, rank)
    tokens, types, scores = [], [], []
    for index in range(max([*pieces, *added]) + 1):
        token, kind, score = f"[PAD{index}]", UNUSED, -1000.0
        if each := added.get(index):
            token, kind = each["content"], CONTROL
            if not each["special"] and not _LOOKS_SPECIAL.fullmatch(token):
                token, kind = token.replace("▁", " "), USER_DEFINED
            elif model == "llama" and token == "<unk>":
                kind = UNKNOWN
        elif index in pieces:
            token, kind = pieces[index], NORMAL
            score = -float(ranks.get(token, len(ranks)))
            if model == "llama" and _BYTE_PIECE.fullmatch(token):
                kind = BYTE
        tokens.append(token)
        types.append(kind)
        scores.append(score)
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_tokenizer_model(model)
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    if model == "llama":
        writer.add_token_scores(scores)
    else:
        writer.add_token_merges([" ".join(merge) for merge in merges])
    for key, value in (metadata or {}).items():
        if isinstance(value, str):
            writer.add_string(f"tokenizer.ggml.{key}", value)
        elif isinstance(value, bool):
            writer.add_bool(f"tokenizer.ggml.{key}", value)
        else:
            writer.add_uint32(f"tokenizer.ggml.{key}", value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
