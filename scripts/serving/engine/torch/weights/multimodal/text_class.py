"""A causal language model for text configs to which transformers gives a bare model only.

The language models inside Qwen-VL and GLM-V checkpoints are such. The class made here is that model
and a linear head over it: whether this is all that the multimodal class does with text is proven at
build (`outer_model.OuterModel.around`).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, GenerationMixin, PreTrainedConfig
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.models.auto.modeling_auto import MODEL_MAPPING

_auto: Any = AutoModelForCausalLM
_causal: Any = _auto._model_mapping
_models: Any = MODEL_MAPPING


def with_text_class(config: PreTrainedConfig) -> PreTrainedConfig:
    """`config` itself, for which `AutoModelForCausalLM` now has a class if one can be made.

    Only for configs of engine folders, and for text configs of multimodal ones: a text encoder would
    get a head that nobody trained.
    """
    kind = type(config)
    if kind not in _causal and (model := _models.get(kind, None)) is not None:
        # Its `register` passes over configs of transformers itself.
        _causal._extra_content[kind] = _make_class(kind, model)
    return config


def _make_class(config_class: type, model_class: Any) -> Any:
    base: Any = next(
        each for each in model_class.__mro__ if each.__name__.endswith("PreTrainedModel")
    )

    def __init__(self: Any, config: PreTrainedConfig) -> None:
        base.__init__(self, config)
        self.model = model_class._from_config(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    name = model_class.__name__.removesuffix("Model").removesuffix("Text") + "ForCausalLM"
    return type(
        name,
        (base, GenerationMixin),
        {
            "__init__": __init__,
            "__module__": __name__,
            "__annotations__": {"config": config_class},
            "forward": _forward,
            "config_class": config_class,
            "base_model_prefix": "model",
            "_tied_weights_keys": {"lm_head.weight": "model.embed_tokens.weight"},
        },
    )


def _forward(
    self: Any,
    input_ids: torch.Tensor | None = None,
    attention_mask: torch.Tensor | None = None,
    position_ids: torch.Tensor | None = None,
    past_key_values: Any = None,
    inputs_embeds: torch.Tensor | None = None,
    use_cache: bool | None = None,
    logits_to_keep: int | torch.Tensor = 0,
    **kwargs: Any,
) -> CausalLMOutputWithPast:
    outputs = self.model(
        input_ids=input_ids,
        attention_mask=attention_mask,
        position_ids=position_ids,
        past_key_values=past_key_values,
        inputs_embeds=inputs_embeds,
        use_cache=use_cache,
        **kwargs,
    )
    hidden = outputs.last_hidden_state
    kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
    return CausalLMOutputWithPast(
        logits=self.lm_head(hidden[:, kept, :]), past_key_values=outputs.past_key_values
    )
