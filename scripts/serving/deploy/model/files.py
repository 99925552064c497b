"""Which files make a model, and whether they are all there.

The hub and local folders follow the same rules, so this module knows names and not where the files
come from.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from pathlib import Path

import msgspec
from msgspec import Struct

from serving.config import ModelConfig, Weights
from serving.engine.manifest import ModelFormat
from serving.errors import ConfigError, ModelError

POOLING_FILE = "1_Pooling/config.json"
"""Of sentence-transformers: how hidden states make an embedding."""
BUNDLED_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"

_COMPANIONS = re.compile(
    r"config\.json|hf_quant_config\.json|generation_config\.json|tokenizer\.json|tokenizer_config\.json"
    r"|special_tokens_map\.json|added_tokens\.json|vocab\.json|vocab\.txt|merges\.txt"
    r"|modules\.json|1_Pooling/config\.json"
    r"|tokenizer\.model|spiece\.model|sentencepiece\.bpe\.model|chat_template\.jinja"
    r"|chat_template\.json|processor_config\.json"
)
_WEIGHTS: dict[ModelFormat, str] = {
    "safetensors": "model.safetensors",
    "pickle": "pytorch_model.bin",
}

_TOKENIZERS = {
    *("tokenizer.json", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model"),
    *("vocab.json", "vocab.txt"),
}
"""Any one of these is enough to have a tokenizer."""
_OTHER_TOKENIZERS = {"tekken.json", "tiktoken.model", "tokenizer.model.v3", "tokenizer.tiktoken"}
"""These are not read."""

ReadFile = Callable[[str], bytes]
"""The content of a file of the model, by its name."""


class _Index(Struct, frozen=True):
    weight_map: dict[str, str]


class WeightFiles(Struct, frozen=True):
    """A complete model: `names` are relative to `folder`, weights and companions alike."""

    folder: Path
    format: ModelFormat
    names: list[str]


def select_files(
    names: Iterable[str],
    *,
    read: ReadFile,
    where: str,
    allow_pickle: bool,
    weights: Weights = "real",
    needs_tokenizer: bool = False,
) -> tuple[ModelFormat, list[str]]:
    """The files to use out of the `names` that a repository or folder holds.

    These are the files that transformers would load. Training state and weights for other
    frameworks stay behind; with dummy `weights`, so do all weights. An index, where there is one,
    names the shards; `read` brings it. Raises ModelError that names what is missing.
    """
    present = set(names)
    if "config.json" not in present:
        raise ModelError(f"{where} has no config.json, so it is not a model", remedy=_hint(present))
    companions = [name for name in present if _COMPANIONS.fullmatch(name)]
    if weights == "dummy":
        if needs_tokenizer:
            _require_tokenizer(present, where, weights)
        return "config", sorted(companions)
    for kind, single in _WEIGHTS.items():
        index = f"{single}.index.json"
        if not {single, index} & present:
            continue
        if kind == "pickle" and not allow_pickle:
            raise ModelError(
                f"{where} has only `.bin` weights, which can run code when they are loaded",
                remedy="choose a model with safetensors, or trust this one: "
                "`model.allow_pickle: true`",
            )
        if single in present:
            files = [single]
        else:
            files = [index, *_shards(read(index), f"{where}: {index}", present)]
        if needs_tokenizer:
            _require_tokenizer(present, where, weights)
        return kind, sorted([*companions, *files])
    raise ModelError(f"{where} has no model.safetensors", remedy=_hint(present))


def _hint(present: set[str]) -> str:
    if any(name.endswith(".gguf") for name in present):
        return "download one of its `.gguf` files, and set `model.id` to the file's path"
    if any(name.startswith("adapter_") for name in present):
        return "this is an adapter: merge it into its base model first, and serve the result"
    if "config.json" in present:
        return "add the weights, or use random ones of this shape: `engine.weights: dummy`"
    return "check `model.id`: a folder or repository in Hugging Face layout is needed"


def _shards(content: bytes, index: str, present: set[str]) -> list[str]:
    """The files that an index names. Raises ModelError when some are not `present`."""
    try:
        listed = msgspec.json.decode(content, type=_Index).weight_map
    except msgspec.DecodeError as exc:
        raise ModelError(f"{index} is damaged: {exc}", remedy="fetch or copy it again") from exc
    shards = sorted(set(listed.values()))
    missing = [name for name in shards if name not in present]
    if missing or not shards:
        raise ModelError(
            f"{index} names {len(missing)} missing files: {', '.join(missing[:3]) or 'none at all'}",
            remedy="complete the model, or fetch it again",
        )
    return shards


def _require_tokenizer(present: set[str], where: str, weights: Weights) -> None:
    """Any tokenizer serves random weights; real ones know only their own."""
    if _TOKENIZERS & present:
        return
    found = sorted(_OTHER_TOKENIZERS & present)
    only = f"; {found[0]} is of a kind that is not read" if found else ""
    raise ModelError(
        f"{where} has no tokenizer.json{only}",
        remedy="set `model.tokenizer: bundled`, or to a folder or `.gguf` file that has one"
        if weights == "dummy"
        else "add the one that this model was published with, or set `model.tokenizer` to a folder "
        "or `.gguf` file that has it",
    )


def tokenizer_source(config: ModelConfig) -> Path | None:
    """The folder or GGUF file that `model.tokenizer` means; None where it is not a path.

    Raises ConfigError when it does not exist or has no tokenizer.
    """
    if config.tokenizer in (None, "bundled"):
        return None
    path = Path(str(config.tokenizer)).expanduser().absolute()
    if not (path.is_file() and path.suffix == ".gguf") and not (path / "tokenizer.json").is_file():
        raise ConfigError(
            "model.tokenizer",
            f"{path} is neither a `.gguf` file nor a folder with a tokenizer.json",
            remedy="set it to such a file or folder, or to `bundled`",
        )
    return path


def local_files(config: ModelConfig, *, weights: Weights = "real") -> WeightFiles:
    """The model in the person's own folder or GGUF file. Reads names only.

    Raises ConfigError when the path does not exist, ModelError when it holds no model.
    """
    path = Path(config.id).expanduser().absolute()
    if path.is_file():
        if path.suffix != ".gguf":
            raise ConfigError(
                "model.id",
                f"{path} is a file but not a `.gguf`",
                remedy="set it to the folder instead",
            )
        if re.search(r"-\d+-of-\d+\.gguf$", path.name):
            raise ModelError(
                f"{path.name} is one piece of a split GGUF",
                remedy="merge the pieces first (`llama-gguf-split --merge`)",
            )
        return WeightFiles(path.parent, "gguf", [path.name])
    if not path.is_dir():
        raise ConfigError(
            "model.id", f"{path} does not exist", remedy="set it to a folder or a `.gguf` file"
        )
    names = [entry.name for entry in path.iterdir() if entry.is_file()]
    names += [POOLING_FILE] * (path / POOLING_FILE).is_file()
    ggufs = [name for name in names if name.endswith(".gguf")]
    if "config.json" not in names and len(ggufs) == 1:
        return WeightFiles(path, "gguf", ggufs)
    kind, chosen = select_files(
        names,
        read=lambda name: (path / name).read_bytes(),
        where=str(path),
        allow_pickle=config.allow_pickle,
        weights=weights,
        needs_tokenizer=config.tokenizer is None,
    )
    return WeightFiles(path, kind, chosen)
