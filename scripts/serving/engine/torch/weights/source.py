"""A downloaded model as transformers reads it: a Hugging Face folder, or one GGUF file.

The tokenizer may be another model's, lent to one that has no weights of its own.

Nothing here reaches the network, and no code that came with a model is run.
"""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from serving.config import TextOnly
from serving.engine.manifest import ModelManifest
from serving.engine.torch.weights import gguf_config, gguf_tokenizer, sentencepiece_tokenizer
from serving.engine.torch.weights.multimodal.extract import extract_text
from serving.engine.torch.weights.multimodal.outer_model import OuterModel, is_multimodal
from serving.engine.torch.weights.quantized.select import quantized_form
from serving.errors import ModelError
from serving.model_folder import POOLING_FILES
from serving.progress import Report

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig, PreTrainedModel

_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
)


_PROCESSOR_TEMPLATES = ("chat_template.json", "processor_config.json")

# Tensors without which others mean something else: scales, zero points, positions of experts.
_MEANINGFUL = re.compile(
    r"scale|zero_?point|zeros|qweight|g_idx|absmax|amax|_packed|_blocks$|codebook|quant_state"
    r"|rope_f|lora_|smooth|proj\.bias$"
)


class Source:
    """Raises ModelError when transformers does not know the architecture.

    `config` is the language model's, as if it were not quantized; `outer` is the multimodal model
    around it, or None.
    """

    def __init__(self, manifest: ModelManifest, text_only: TextOnly = "auto") -> None:
        self.manifest = manifest
        self.folder = Path(manifest.path)
        self._gguf: Path | None = None
        self._how: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
        if manifest.format == "gguf":
            self._gguf = self.folder / manifest.files[0].path
            self._how["gguf_file"] = self._gguf.name
            self._facts = self._read_facts(self._gguf)
        self.quantized = None if self._gguf else quantized_form(self.folder)
        self.config = self._read_config()
        self.outer: OuterModel | None = None
        self._text_only = text_only
        if text_only is not False and is_multimodal(self.config):
            self.outer = OuterModel(self.config)
            self.config = self.outer.text_config

    def _read_facts(self, path: Path) -> gguf_config.GgufFacts:
        """What a GGUF file says, when its tokenizer and its architecture are known to be exact."""
        gguf_tokenizer.require_exact(gguf_tokenizer.read_metadata(path))
        facts = gguf_config.GgufFacts(path)
        facts.require_known()
        return facts

    def _read_config(self) -> PreTrainedConfig:
        from transformers import AutoConfig

        try:
            config: PreTrainedConfig = AutoConfig.from_pretrained(self.folder, **self._how)
        except Exception as exc:  # whatever a family's config raises for values that do not fit
            raise ModelError(
                f"transformers does not know this model: {first_line(exc)}",
                remedy="use a model of a released architecture; code inside models is never run",
            ) from exc
        if self._gguf:
            config = gguf_config.complete(config, self._facts)
            gguf_config.require_all_read(config, self._facts)
        for each in (config, config.get_text_config()):
            if hasattr(each, "quantization_config"):
                del each.quantization_config
        return config

    def load(self, dtype: torch.dtype) -> PreTrainedModel:
        """The model with all weights in `dtype` on the CPU. Raises ModelError."""
        weights = {"use_safetensors": self.manifest.format == "safetensors"}
        how = self._how if self._gguf else self._how | weights
        return load_model(self.folder, self.config, dtype, self.manifest.id, **how)

    def unpacked(self, folder: Path, dtype: str, report: Report) -> Source:
        """The checkpoint with plain weights in `dtype`, written to the new `folder`; itself, where
        they are plain already. Raises ModelError."""
        if self.quantized is None:
            return self
        import torch

        from serving.engine.torch.weights.quantized.unpack import unpack_checkpoint

        folder.mkdir()
        plain = unpack_checkpoint(
            self.manifest, self.quantized, folder, getattr(torch, dtype), report
        )
        return Source(plain, self._text_only)

    def text_checkpoint(self, folder: Path, report: Report) -> Source:
        """The checkpoint of the language model alone, extracted to the new `folder`; itself, where
        there is nothing else in it. Raises ModelError."""
        if self.outer is None:
            return self
        self.outer.require_text_model()
        folder.mkdir()
        text = Source(extract_text(self.manifest, self.outer, folder, report))
        text.reference_model = self.reference_model  # type: ignore[method-assign]
        return text

    def reference_model(self, model: PreTrainedModel) -> PreTrainedModel:
        """What `model`, the language model, must answer like: the multimodal model around it."""
        return self.outer.around(model) if self.outer else model

    def save_config(self, target: Path) -> None:
        """Write config.json: the model's own, or what its GGUF file or multimodal one implies."""
        if self._gguf or self.outer or self.quantized:
            self.config.save_pretrained(target)
        else:
            shutil.copyfile(self.folder / "config.json", target / "config.json")

    def save_pooling(self, target: Path) -> None:
        """Copy what sentence-transformers wrote about embeddings, if it did."""
        own = {file.path for file in self.manifest.files}
        for name in POOLING_FILES:
            if name in own:
                (target / name).parent.mkdir(exist_ok=True)
                shutil.copyfile(self.folder / name, target / name)

    def save_tokenizer(self, target: Path) -> None:
        """Write tokenizer.json and its companions. Raises ModelError."""
        max_len = self.config.max_position_embeddings
        path = Path(self.manifest.tokenizer) if self.manifest.tokenizer else self._gguf
        if path is not None and path.is_file():
            gguf_tokenizer.save(path, target, max_len)
        else:
            save_tokenizer(path or self.folder, target)

    def generation_config(self) -> dict[str, Any]:
        """The content of generation_config.json; empty when there is none."""
        path = self.folder / "generation_config.json"
        try:
            found: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
        except ValueError as exc:
            raise ModelError(f"{path} is damaged: {exc}", remedy="repair or remove it") from exc
        return found


def save_tokenizer(folder: Path, target: Path) -> None:
    """Write the tokenizer of a Hugging Face `folder` to `target`. Raises ModelError."""
    if (folder / "tokenizer.json").exists():
        for name in _TOKENIZER_FILES:
            if (folder / name).exists():
                shutil.copyfile(folder / name, target / name)
    else:
        _convert_tokenizer(folder, target)
    _save_chat_template(folder, target)


def _convert_tokenizer(folder: Path, target: Path) -> None:
    """Through transformers, from whatever form the tokenizer has."""
    from transformers import AutoTokenizer

    pieces = sentencepiece_tokenizer.find(folder)
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False
        )
    except (OSError, ValueError, KeyError, ImportError) as exc:
        raise ModelError(
            f"the tokenizer cannot be read: {first_line(exc)}",
            remedy="add a tokenizer.json to the model",
        ) from exc
    if pieces:
        sentencepiece_tokenizer.require_same(tokenizer, pieces)
    tokenizer.save_pretrained(target)
    if not (target / "tokenizer.json").exists():
        raise ModelError(
            "the model's tokenizer cannot be written as a tokenizer.json",
            remedy="choose a model that comes with one",
        )


def _save_chat_template(folder: Path, target: Path) -> None:
    """Some repositories have their template among the files of their processor and nowhere else."""
    tokenizer = target / "tokenizer_config.json"
    for name in _PROCESSOR_TEMPLATES:
        path = folder / name
        if not path.exists() or (target / "chat_template.jinja").exists():
            continue
        try:
            known = json.loads(tokenizer.read_bytes()) if tokenizer.exists() else {}
            template = json.loads(path.read_bytes()).get("chat_template")
        except (ValueError, AttributeError) as exc:
            raise ModelError(f"{path} is damaged: {exc}", remedy="repair or remove it") from exc
        if isinstance(template, str) and not known.get("chat_template"):
            (target / "chat_template.jinja").write_text(template)


def load_model(
    folder: Path, config: PreTrainedConfig, dtype: torch.dtype, model_id: str, **how: Any
) -> PreTrainedModel:
    """Load for evaluation; every weight must be there. Raises ModelError, which names `model_id`.

    Attention is `eager`: it honours every mask, cap and sink, where faster ones pass over some.
    """
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM

    auto: Any = AutoModelForCausalLM
    try:
        model, info = auto.from_pretrained(
            folder,
            config=config,
            dtype=dtype,
            attn_implementation="eager",
            output_loading_info=True,
            **how,
        )
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as exc:
        raise ModelError(
            f"{model_id} cannot be loaded: {first_line(exc)}",
            remedy="fetch or copy the model again",
        ) from exc
    if unused := sorted(name for name in info["unexpected_keys"] if _MEANINGFUL.search(name)):
        raise ModelError(
            f"{model_id} has {len(unused)} tensors that say how to read its weights, and that the "
            f"model would pass over: {', '.join(unused[:3])}",
            remedy="use a copy whose config.json states how its weights are quantized, or one in "
            "bfloat16",
        )
    # transformers fills what is missing with random numbers and goes on.
    if lacking := sorted(map(str, [*info["missing_keys"], *info["mismatched_keys"]])):
        raise ModelError(
            f"{model_id} lacks {len(lacking)} weights: {', '.join(lacking[:3])}",
            remedy="complete the model: it would run with random numbers in their place",
        )
    loaded: PreTrainedModel = model.eval()
    return loaded


def first_line(exc: Exception) -> str:
    return (str(exc).strip() or type(exc).__name__).splitlines()[0]
