"""A multimodal checkpoint seen from its language model: the class around it, and the names in it.

The multimodal class is only ever made without memory (on the device `meta`). It says which names of
the checkpoint are the language model's, and, with the language model put into its place, what
`generate` of the whole answers to text: the reference that a text model must equal.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

from serving.engine.torch.weights.multimodal.text_class import with_text_class
from serving.errors import ModelError
from serving.protocol import TextOf

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig, PreTrainedModel

REMEDY = "choose a text model, or `engine.backend: tensorrt_llm` on GPUs"
_PREFIX_LM = {"paligemma"}
_SPECIAL = ("eos_token_id", "bos_token_id", "pad_token_id")


def is_multimodal(config: PreTrainedConfig) -> bool:
    """Whether transformers has a multimodal class for it, with a language model inside."""
    return multimodal_class(config) is not None and config.get_text_config() is not config


def multimodal_class(config: PreTrainedConfig) -> Any:
    """transformers' class for text with images, video or audio, or None."""
    from transformers import AutoModelForMultimodalLM

    mapping: Any = AutoModelForMultimodalLM._model_mapping
    return mapping.get(type(config), None)


class WeightMeaning(NamedTuple):
    """`text_name` is None for what is not the language model's.

    With a `converter`, the weight is made from all tensors whose `outer_name` is this one, and
    `pattern` is what the converter calls this one.
    """

    outer_name: str
    text_name: str | None
    converter: Any = None
    pattern: str = ""


class _NameMapping(NamedTuple):
    """How transformers reads checkpoints of a class; `known` are the class's own weights."""

    renamings: list[Any]
    converters: list[Any]
    converter_of: dict[str, Any]
    known: dict[str, torch.Tensor]
    base_prefix: str

    @classmethod
    def of(cls, model: Any) -> _NameMapping:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, WeightRenaming

        entries = get_model_conversion_mapping(model)
        renamings = [each for each in entries if isinstance(each, WeightRenaming)]
        converters = [each for each in entries if isinstance(each, WeightConverter)]
        by_pattern = {pattern: each for each in converters for pattern in each.source_patterns}
        return cls(renamings, converters, by_pattern, model.state_dict(), model.base_model_prefix)


class OuterModel:
    """The multimodal model that `config` describes, around its language model's `text_config`."""

    def __init__(self, config: PreTrainedConfig) -> None:
        """Costs nothing: no model is made before `require_text_model`."""
        self.config = config
        self._class = multimodal_class(config)
        self.architecture: str = self._class.__name__
        self.text_config = with_text_class(copy.deepcopy(config.get_text_config()))
        for key in _SPECIAL:
            stated = getattr(config, key, None)
            inner = getattr(self.text_config, key, None)
            setattr(self.text_config, key, inner if stated is None else stated)
        if quantization := getattr(config, "quantization_config", None):
            self.text_config.quantization_config = quantization

    def require_text_model(self) -> None:
        """Complete `text_config`. Raises ModelError when transformers has no class for it alone."""
        from transformers import AutoModelForCausalLM

        if self.config.model_type in _PREFIX_LM:
            raise self._refusal("within a prompt, its tokens attend to later ones as well")
        mapping: Any = AutoModelForCausalLM._model_mapping
        text_class = mapping.get(type(self.text_config), None)
        if text_class is None:
            raise self._refusal("transformers has no class for its language model alone")
        self.text_config.architectures = [text_class.__name__]
        prefixes = self.prefixes
        self.text_config.tie_word_embeddings = f"{prefixes['head']}.weight" in (
            self._outer.all_tied_weights_keys
        )
        if type(self._text.get_decoder()) is not type(self._outer.get_decoder()):
            raise self._refusal(f"its language model is no {text_class.__name__}")

    @functools.cached_property
    def _outer(self) -> Any:
        return self._on_meta(self.config)

    @functools.cached_property
    def _text(self) -> Any:
        import torch
        from transformers import AutoModelForCausalLM

        auto: Any = AutoModelForCausalLM
        with torch.device("meta"):
            return auto.from_config(self.text_config)

    def _on_meta(self, config: PreTrainedConfig) -> Any:
        import torch

        try:
            with torch.device("meta"):
                try:
                    return self._class._from_config(config)
                except ImportError:
                    with without_towers(config):
                        return self._class._from_config(config)
        except Exception as exc:  # whatever a family's config and modules raise
            reason = (str(exc).strip() or type(exc).__name__).splitlines()[0]
            raise self._refusal(
                f"{self.architecture} cannot be made from its config: {reason}"
            ) from exc

    @functools.cached_property
    def prefixes(self) -> dict[str, str]:
        """Where the outer model has the `decoder` and the `head`."""
        return {
            "decoder": _name_of(self._outer, self._outer.get_decoder()),
            "head": _name_of(self._outer, self._outer.get_output_embeddings()),
        }

    @property
    def text_of(self) -> TextOf:
        """What is served, and the outermost modules that no text passes through."""
        kept = tuple(self.prefixes.values())
        return TextOf(self.architecture, list(_outside(self._outer, "", kept)))

    @property
    def tied(self) -> tuple[str, str]:
        """The text class's names for the embedding and the head, which may be one weight."""
        text = self._text
        embedding, head = text.get_input_embeddings(), text.get_output_embeddings()
        return f"{_name_of(text, embedding)}.weight", f"{_name_of(text, head)}.weight"

    def text_name(self, outer_name: str) -> str | None:
        """The text class's name for what the outer class calls `outer_name`; None: not its."""
        text = self._text
        decoder, head = text.get_decoder(), text.get_output_embeddings()
        for outer_prefix, module in (
            (self.prefixes["decoder"], decoder),
            (self.prefixes["head"], head),
        ):
            if outer_name.startswith(f"{outer_prefix}."):
                name = f"{_name_of(text, module)}{outer_name[len(outer_prefix) :]}"
                return name.removeprefix(".")  # the class as a whole may be inside
        return None

    def meaning(self, name: str) -> WeightMeaning:
        """What `name` in the checkpoint is, by transformers' mapping for the multimodal class."""
        from transformers.core_model_loading import rename_source_key

        mapping = self._mapping
        base, known = mapping.base_prefix, mapping.known
        final, pattern = rename_source_key(name, mapping.renamings, mapping.converters, base, known)
        if final not in known and name in known:
            final, pattern = rename_source_key(name, [], [], base, known)
        text_name = self.text_name(final)
        if pattern is None or text_name is None:
            return WeightMeaning(final, text_name)
        raw, _ = rename_source_key(name, mapping.renamings, [])
        raw_name = self.text_name(raw) or self.text_name(f"{base}.{raw}")
        if raw_name is not None and self._text_converts(raw_name):
            return WeightMeaning(final, raw_name)
        return WeightMeaning(final, text_name, mapping.converter_of[pattern], pattern)

    def convert(self, converter: Any, outer_name: str) -> dict[str, torch.Tensor]:
        """Weights by the outer class's names. Raises whatever transformers raises."""
        made = converter.convert(outer_name, model=self._outer, config=self._outer.config)
        return {name: each[0] if isinstance(each, list) else each for name, each in made.items()}

    @functools.cached_property
    def _mapping(self) -> _NameMapping:
        return _NameMapping.of(self._outer)

    def _text_converts(self, name: str) -> bool:
        from transformers.core_model_loading import rename_source_key

        mapping = self._text_mapping
        return rename_source_key(name, mapping.renamings, mapping.converters)[1] is not None

    @functools.cached_property
    def _text_mapping(self) -> _NameMapping:
        return _NameMapping.of(self._text)

    def around(self, text_model: PreTrainedModel) -> PreTrainedModel:
        """The outer model whose language model is `text_model`: for prompts of text only."""
        config = copy.deepcopy(self.config)
        config.text_config = copy.deepcopy(text_model.config)
        outer: Any = self._on_meta(config)
        text: Any = text_model
        _put(outer, self.prefixes["decoder"], text.get_decoder())
        _put(outer, self.prefixes["head"], text.get_output_embeddings())
        _run_on_cpu(outer)
        whole: PreTrainedModel = outer.eval()
        return whole

    def _refusal(self, reason: str) -> ModelError:
        return ModelError(f"the text of this model cannot be served alone: {reason}", remedy=REMEDY)


def _name_of(model: Any, wanted: Any) -> str:
    name: str = next(name for name, module in model.named_modules() if module is wanted)
    return name


def _outside(module: Any, name: str, kept: tuple[str, ...]) -> Iterator[str]:
    for child_name, child in module.named_children():
        path = f"{name}.{child_name}".removeprefix(".")
        if path in kept:
            continue
        if any(each.startswith(f"{path}.") for each in kept):
            yield from _outside(child, path, kept)
        else:
            yield path


def _put(model: Any, name: str, module: Any) -> None:
    parent, _, last = name.rpartition(".")
    setattr(model.get_submodule(parent), last, module)


@contextmanager
def without_towers(config: PreTrainedConfig) -> Iterator[None]:
    """Image and audio encoders that need libraries of their own become empty modules."""
    import torch
    from transformers import AutoModel

    auto: Any = AutoModel
    make, text = auto.from_config, type(config.get_text_config())

    def from_config(config: PreTrainedConfig, **kwargs: Any) -> Any:
        return make(config, **kwargs) if type(config) is text else torch.nn.Identity()

    auto.from_config = from_config
    try:
        yield
    finally:
        del auto.from_config  # the inherited one is back


def _run_on_cpu(model: torch.nn.Module) -> None:
    """A module without memory that text does reach gets zeros: they may be computed, not used."""
    import torch
    from transformers import PreTrainedModel

    def fill(module: torch.nn.Module, _: Any) -> None:
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                if tensor is not None and tensor.is_meta:
                    zeros: Any = torch.zeros_like(tensor, device="cpu")
                    is_parameter = tensors is module._parameters
                    tensors[name] = torch.nn.Parameter(zeros) if is_parameter else zeros

    for module in model.modules():
        own = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
        if any(tensor.is_meta for tensor in own):
            module.register_forward_pre_hook(fill)
        if isinstance(module, PreTrainedModel) and module.device.type == "meta":
            # It goes by its first parameter, which is an image encoder's.
            kind = type(module)
            on_cpu = {"device": property(lambda _: torch.device("cpu"))}
            module.__class__ = type(kind.__name__, (kind,), on_cpu)
