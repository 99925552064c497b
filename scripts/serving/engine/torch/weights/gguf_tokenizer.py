"""The tokenizer inside a GGUF file, put right where transformers' conversion departs from it.

Seen with transformers 5.17: the end-of-sequence token becomes the beginning one, padding is lost,
digits are not split, and the decoder treats a literal U+2581 as a space. A tokenizer that cannot
be reproduced exactly is refused: wrong tokens look like a bad model.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from serving.errors import ModelError

_BYTE_LEVEL_KINDS = {"gpt-2", "smollm", "qwen2"}
_BROKEN = {"gemma", "gemma2", "gemma3"}  # come out of the conversion as another kind of model

Metadata = dict[str, Any]


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
    architecture = metadata.get("general.architecture")
    kind = metadata.get("tokenizer.ggml.pre", "gpt-2")
    byte_level = metadata.get("tokenizer.ggml.model") == "gpt2"
    if architecture in _BROKEN or (byte_level and kind not in _BYTE_LEVEL_KINDS):
        what = kind if byte_level else architecture
        raise ModelError(
            f"the tokenizer in this GGUF file ({what}) cannot be converted exactly",
            remedy="use the model's original repository or folder with safetensors",
        )


def repair(tokenizer: Any, metadata: Metadata, model_max_len: int) -> None:
    """Make a transformers tokenizer what the metadata says, in place."""
    from tokenizers import decoders, pre_tokenizers, processors

    tokenizer.model_max_length = model_max_len
    tokenizer.clean_up_tokenization_spaces = False  # it would eat spaces before punctuation
    backend = tokenizer.backend_tokenizer
    model = metadata.get("tokenizer.ggml.model")
    if metadata.get("tokenizer.ggml.pre") == "smollm":
        backend.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Digits(individual_digits=True),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
            ]
        )
    if model == "gpt2":
        backend.decoder = decoders.ByteLevel()
    names = {"bos": "bos_token", "eos": "eos_token", "unknown": "unk_token", "padding": "pad_token"}
    for key, name in names.items():
        token_id = metadata.get(f"tokenizer.ggml.{key}_token_id")
        setattr(tokenizer, name, None if token_id is None else backend.id_to_token(token_id))
    if metadata.get("tokenizer.ggml.add_bos_token", model == "llama") and tokenizer.bos_token:
        bos = (tokenizer.bos_token, tokenizer.bos_token_id)
        backend.post_processor = processors.TemplateProcessing(
            single=f"{bos[0]} $A", special_tokens=[bos]
        )
