"""The language model's weights of a multimodal checkpoint become a checkpoint of their own.

One shard after another, tensor by tensor: nothing of the image and audio encoders is read, and the
dtypes stay as they are. transformers' own mapping for the multimodal class says what a name in the
checkpoint means. What must be computed from several tensors (fused experts) is left to the text
class when it knows how, and done here otherwise.
"""

from __future__ import annotations

import contextlib
import copy
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import msgspec

from serving.engine.files import human, require_space
from serving.engine.manifest import ModelFile, ModelManifest
from serving.engine.torch.weights.multimodal.outer_model import REMEDY, OuterModel
from serving.engine.torch.weights.shards import write_shards
from serving.errors import ModelError
from serving.progress import Report

if TYPE_CHECKING:
    import torch


class TensorPlace(NamedTuple):
    """A tensor of the checkpoint; `pattern` is what a converter calls it."""

    file: str
    name: str
    pattern: str


@dataclass
class WeightRecipe:
    """How weights of the text model are made. Without a converter: the one source, as it is."""

    outer_name: str
    converter: Any = None
    sources: list[TensorPlace] = field(default_factory=list)


def extract_text(
    manifest: ModelManifest, outer: OuterModel, target: Path, report: Report
) -> ModelManifest:
    """Write the language model of `manifest` to the empty folder `target`: config.json and shards.

    Raises ModelError: weights of another format, damaged files, no room, or nothing to extract.
    """
    from safetensors import SafetensorError

    if manifest.format != "safetensors":
        raise ModelError(
            f"the text of this model cannot be served alone: its weights are {manifest.format}",
            remedy="save it as safetensors, or choose a text model",
        )
    files = [file.path for file in manifest.files if file.path.endswith(".safetensors")]
    try:
        with contextlib.ExitStack() as opened:
            readers = _open(Path(manifest.path), files, opened)
            recipes, left_out = plan_extraction(readers, outer)
            if not recipes:
                raise ModelError(
                    "the text of this model cannot be served alone: its weights have no language model",
                    remedy=REMEDY,
                )
            _settle_tie(readers, recipes, outer)
            size = sum(
                _num_bytes(readers, each) for recipe in recipes.values() for each in recipe.sources
            )
            require_space(target, size, "the text model")
            names = ", ".join(
                f"{name} ({count} tensors)" for name, count in sorted(left_out.items())
            )
            report(
                f"taking the language model's {human(size)} out of the checkpoint, without {names}"
            )
            written = write_shards(_made(readers, recipes, outer), target)
    except SafetensorError as exc:
        raise ModelError(
            f"the weights are damaged: {exc}", remedy="fetch or copy the model again"
        ) from exc
    outer.text_config.save_pretrained(target)
    return msgspec.structs.replace(
        manifest,
        source="hub",  # the files are ours: they may be linked
        path=str(target),
        files=[
            ModelFile(name, (target / name).stat().st_size) for name in ["config.json", *written]
        ],
    )


def plan_extraction(
    readers: dict[str, Any], outer: OuterModel
) -> tuple[dict[str, WeightRecipe], Counter[str]]:
    """Recipes by the name of the first weight they make; numbers of tensors by module left out."""
    from transformers.core_model_loading import dot_natural_key

    places = sorted(
        ((name, file) for file, reader in readers.items() for name in reader.keys()),  # noqa: SIM118
        key=lambda each: dot_natural_key(each[0]),
    )
    recipes: dict[str, WeightRecipe] = {}
    left_out: Counter[str] = Counter()
    for name, file in places:
        meaning = outer.meaning(name)
        if meaning.text_name is None:
            first, _, rest = meaning.outer_name.partition(".")
            left_out[f"{first}.{rest.partition('.')[0]}" if first == "model" else first] += 1
            continue
        recipe = recipes.setdefault(
            meaning.text_name, WeightRecipe(meaning.outer_name, copy.deepcopy(meaning.converter))
        )
        if recipe.sources and meaning.converter is None:
            raise ModelError(
                f"{name} and {recipe.sources[0].name} are the same weight of the language model",
                remedy="fetch or copy the model again",
            )
        recipe.sources.append(TensorPlace(file, name, meaning.pattern))
    return recipes, left_out


def _settle_tie(
    readers: dict[str, Any], recipes: dict[str, WeightRecipe], outer: OuterModel
) -> None:
    """A config may say that the head is the embedding, and the weights that it is another.

    transformers goes by the weights. So does the config of the text model.
    """
    if not outer.text_config.tie_word_embeddings:
        return
    embedding, head = (recipes.get(name) for name in outer.tied)
    if embedding is None or head is None:
        return
    table, rows = (
        readers[place.file].get_tensor(place.name)
        for place in (embedding.sources[0], head.sources[0])
    )
    if table.equal(rows):
        del recipes[outer.tied[1]]
    else:
        outer.text_config.tie_word_embeddings = False


def _made(
    readers: dict[str, Any], recipes: dict[str, WeightRecipe], outer: OuterModel
) -> Iterator[tuple[str, torch.Tensor]]:
    """The text model's weights, one after another."""
    from transformers.core_model_loading import SkipParameters

    for name, recipe in recipes.items():
        if recipe.converter is None:
            place = recipe.sources[0]
            yield name, readers[place.file].get_tensor(place.name)
            continue
        for place in recipe.sources:
            read = _reading(readers[place.file], place.name)
            recipe.converter.add_tensor(recipe.outer_name, place.name, place.pattern, read)
        try:
            made = outer.convert(recipe.converter, recipe.outer_name)
        except (SkipParameters, RuntimeError, ValueError, KeyError) as exc:
            raise ModelError(
                f"{recipe.sources[0].name} cannot be made into {name}",
                remedy="fetch or copy the model again",
            ) from exc
        for outer_name, tensor in made.items():
            text_name = outer.text_name(outer_name)
            assert text_name is not None, "a converter stays within its module"
            yield text_name, tensor


def _reading(reader: Any, name: str) -> Any:
    return lambda: reader.get_tensor(name)


def _open(folder: Path, files: Sequence[str], opened: contextlib.ExitStack) -> dict[str, Any]:
    from safetensors import safe_open

    return {name: opened.enter_context(safe_open(folder / name, framework="pt")) for name in files}


def _num_bytes(readers: dict[str, Any], place: TensorPlace) -> int:
    shape = readers[place.file].get_slice(place.name)
    number = 1
    for size in shape.get_shape():
        number *= size
    return number * _WIDTHS.get(shape.get_dtype(), 4)


_WIDTHS = {"F64": 8, "I64": 8, "BF16": 2, "F16": 2, "F8_E4M3": 1, "F8_E5M2": 1, "U8": 1, "I8": 1}
