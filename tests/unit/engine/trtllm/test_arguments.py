"""From the engine's YAML to what one version's `LLM` takes."""

from pathlib import Path
from typing import Any, ClassVar

import pytest
from serving.engine.trtllm.arguments import LlmArguments, read_arguments
from serving.engine.trtllm.versions import parse_version
from serving.errors import ModelError, OperatorError

VERSION = parse_version("1.1.0")
YAML = """\
# a reason
model: checkpoint
tensor_parallel_size: 2
cuda_graph_config: null
kv_cache_config:
  # another
  event_buffer_max_size: 1024
  later_key: 1
later_argument: 3
scheduler_config:
  dynamic_batch_config:
    window: 4
_required: [kv_cache_config.event_buffer_max_size, max_batch_size]
"""


class Model:
    """Takes what its fields name, as the library's pydantic models do."""

    model_fields: ClassVar[dict[str, None]] = {}

    def __init__(self, **given: Any) -> None:
        assert given.keys() <= self.model_fields.keys()
        self.given = given


def model(*fields: str) -> type[Model]:
    return type("Model", (Model,), {"model_fields": dict.fromkeys(fields)})


ARGS = model(
    "model", "tensor_parallel_size", "cuda_graph_config", "kv_cache_config", "scheduler_config"
)
KV = model("event_buffer_max_size")
CLASSES: dict[str, Any] = {
    "KvCacheConfig": KV,
    "SchedulerConfig": model("dynamic_batch_config"),
    "DynamicBatchConfig": model("window"),
}


@pytest.fixture
def arguments(tmp_path: Path) -> LlmArguments:
    (tmp_path / "llm_args-agg.yaml").write_text(YAML)
    return read_arguments(tmp_path, "llm_args-agg.yaml")


def test_paths_are_resolved_and_the_list_of_required_keys_is_none_of_the_arguments(
    arguments: LlmArguments, tmp_path: Path
) -> None:
    assert arguments.values["model"] == str(tmp_path / "checkpoint")
    assert "_required" not in arguments.values
    assert arguments.required == {"kv_cache_config.event_buffer_max_size", "max_batch_size"}
    assert arguments.section("kv_cache_config")["event_buffer_max_size"] == 1024
    assert arguments.section("cuda_graph_config") == {}


def test_unknown_defaults_are_dropped_and_sections_become_the_librarys_classes(
    arguments: LlmArguments,
) -> None:
    fitted = arguments.fitted(ARGS, CLASSES.get, VERSION)
    assert fitted.keys() == set(ARGS.model_fields)
    assert fitted["cuda_graph_config"] is None
    assert isinstance(fitted["kv_cache_config"], KV)
    assert fitted["kv_cache_config"].given == {"event_buffer_max_size": 1024}
    inner = fitted["scheduler_config"].given["dynamic_batch_config"]
    assert isinstance(inner, CLASSES["DynamicBatchConfig"])


def test_section_without_a_class_in_this_version_stays_a_mapping(arguments: LlmArguments) -> None:
    fitted = arguments.fitted(ARGS, lambda name: None, VERSION)
    assert fitted["kv_cache_config"] == {"event_buffer_max_size": 1024, "later_key": 1}


@pytest.mark.parametrize(
    "required", ["later_argument", "kv_cache_config.later_key", "later_argument.inner"]
)
def test_required_key_that_the_version_lacks_is_named_with_the_version(
    arguments: LlmArguments, required: str
) -> None:
    asked = LlmArguments(arguments.values, frozenset({required}))
    with pytest.raises(OperatorError) as caught:
        asked.fitted(ARGS, CLASSES.get, VERSION)
    assert f"`{required.removesuffix('.inner')}`" in caught.value.what
    assert "1.1.0" in caught.value.what
    assert caught.value.remedy


def test_arguments_whose_class_is_unknown_are_all_passed(arguments: LlmArguments) -> None:
    assert arguments.fitted(None, lambda name: None, VERSION) == arguments.values


@pytest.mark.parametrize("text", [None, "a: [", "just text", "tensor_parallel_size: 1"])
def test_damaged_file_is_an_error_with_a_remedy(tmp_path: Path, text: str | None) -> None:
    if text is not None:
        (tmp_path / "x.yaml").write_text(text)
    with pytest.raises(ModelError, match="rebuilds the engine"):
        read_arguments(tmp_path, "x.yaml")
