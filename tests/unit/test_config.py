"""Reading the configuration: strict, and helpful when it refuses."""

from pathlib import Path
from typing import Any

import msgspec
import pytest
import yaml
from serving.config import Config, as_plain, parse
from serving.errors import ConfigError

ROOT = Path(__file__).parents[2]
EXAMPLES = sorted((ROOT / "config" / "examples").glob("*.yaml"))


def refusal(raw: dict[str, Any]) -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        parse(raw)
    return caught.value


def test_empty_config_is_the_defaults() -> None:
    assert parse({}) == Config()


def test_empty_section_is_the_defaults() -> None:
    assert parse({"router": None, "workers": {}}) == Config()


def test_given_keys_replace_defaults_and_leave_the_others() -> None:
    config = parse({"workers": {"decode": 3}})
    assert (config.workers.decode, config.workers.prefill) == (3, 1)


@pytest.mark.parametrize("key", ["router-policy", "router.policy"])
def test_section_and_key_can_be_written_as_one_key(key: str) -> None:
    assert parse({key: "round_robin"}).router.policy == "round_robin"


def test_combined_key_overrides_only_that_key_of_its_section() -> None:
    config = parse({"frontend": {"port": 9000, "max_inflight": 7}, "frontend-port": 9001})
    assert (config.frontend.port, config.frontend.max_inflight) == (9001, 7)


def test_numbers_given_as_text_on_the_command_line_are_numbers() -> None:
    assert parse({"frontend": {"port": "8123"}}).frontend.port == 8123


def test_parsing_does_not_change_its_input() -> None:
    raw: dict[str, Any] = {"router": {"temperature": 0.5}, "router-policy": "random"}
    parse(raw)
    assert raw == {"router": {"temperature": 0.5}, "router-policy": "random"}


def test_unknown_key_is_named_with_the_nearest_known_one() -> None:
    error = refusal({"router": {"polcy": "kv"}})
    assert error.key == "router.polcy"
    assert "did you mean `policy`" in error.remedy


def test_unknown_section_is_named_with_the_nearest_known_one() -> None:
    error = refusal({"worker": {"decode": 2}})
    assert error.key == "worker"
    assert "did you mean `workers`" in error.remedy


@pytest.mark.parametrize(
    ("raw", "key"),
    [
        ({"frontend": {"port": "http"}}, "frontend.port"),
        ({"frontend": {"port": 0}}, "frontend.port"),
        ({"frontend": {"port": 65536}}, "frontend.port"),
        ({"workers": {"decode": 0}}, "workers.decode"),
        ({"workers": {"decode": 1.5}}, "workers.decode"),
        ({"engine": {"block_size": 17}}, "engine.block_size"),
        ({"engine": {"device": "tpu"}}, "engine.device"),
        ({"model": {"id": 5}}, "model.id"),
        ({"router": {"policy": "kvv"}}, "router.policy"),
        ({"etcd": {"lease_s": 1}}, "etcd.lease_s"),
        ({"deadlines": {"total_s": 0}}, "deadlines.total_s"),
        ({"deployment": {"namespace": "Has Spaces"}}, "deployment.namespace"),
        ({"router": "kv"}, "router"),
    ],
)
def test_bad_value_is_refused_by_name_and_value(raw: dict[str, Any], key: str) -> None:
    error = refusal(raw)
    assert error.key == key
    given = raw[key.split(".")[0]]
    assert repr(given if "." not in key else given[key.split(".")[1]]) in str(error)
    assert error.remedy


def test_bad_list_item_is_refused_by_its_key() -> None:
    assert refusal({"workers": {"gpus": [0, -1]}}).key.startswith("workers.gpus")


@pytest.mark.parametrize("key", ["tensor_parallel", "pipeline_parallel"])
def test_unknown_role_is_named_with_the_known_ones(key: str) -> None:
    error = refusal({"workers": {key: {"prefil": 2}}})
    assert error.key == f"workers.{key}.prefil"
    assert "did you mean `prefill`" in error.remedy
    assert "agg, prefill, decode" in error.remedy
    assert str(error).count("\n") == 1


def test_bad_size_of_a_role_is_refused_by_its_key_and_value() -> None:
    error = refusal({"workers": {"tensor_parallel": {"prefill": 0}}})
    assert error.key == "workers.tensor_parallel"
    assert "{'prefill': 0}" in str(error)


@pytest.mark.parametrize(
    ("raw", "key"),
    [
        ({"kv_transfer": {"transport": "tcp"}}, "kv_transfer.transport"),
        ({"tensorrt_llm": {"kv_cache_dtype": "int8"}}, "tensorrt_llm.kv_cache_dtype"),
        ({"engine-kv_cache_dtype": "bfloat16"}, "engine.kv_cache_dtype"),
    ],
)
def test_tensorrt_llm_refuses_values_of_other_engines(raw: dict[str, Any], key: str) -> None:
    assert refusal({"engine": {"backend": "tensorrt_llm"}, **raw}).key == key


def test_torch_workers_use_one_gpu_each() -> None:
    assert refusal({"workers": {"tensor_parallel": {"decode": 2}}}).key == "workers.tensor_parallel"


def test_two_programs_on_one_port_are_refused() -> None:
    error = refusal({"nats": {"port": 8000}})
    assert error.key == "nats.port"
    assert "frontend.port" in error.what


def test_message_is_one_line_and_its_remedy() -> None:
    assert str(refusal({"nats": {"prot": 1}})).count("\n") == 1


def test_plain_data_parses_to_the_same_config() -> None:
    config = parse({"workers": {"gpus": [0, 1]}, "router": {"policy": "random"}})
    assert parse(as_plain(config)) == config


def test_tokenizer_can_be_set_only_for_dummy_weights() -> None:
    error = refusal({"model": {"tokenizer": "bundled"}})
    assert error.key == "model.tokenizer"
    assert "engine.weights: dummy" in error.remedy
    parse({"model": {"tokenizer": "bundled"}, "engine": {"weights": "dummy"}})


def test_tensorrt_llm_has_no_dummy_weights() -> None:
    assert refusal({"engine": {"backend": "tensorrt_llm", "weights": "dummy"}}).key == (
        "engine.weights"
    )


def test_every_key_has_a_description() -> None:
    definitions = msgspec.json.schema(Config)["$defs"]
    for section in msgspec.structs.fields(Config):
        for key, field in definitions[section.type.__name__]["properties"].items():
            assert field.get("description"), f"{section.name}.{key}"


def test_config_yaml_satisfies_the_types() -> None:
    parse(yaml.safe_load((ROOT / "config" / "config.yaml").read_text(encoding="utf-8")) or {})


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_example_satisfies_the_types_and_names_its_command(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    config = parse(yaml.safe_load(text))
    assert text.startswith("# ")
    assert f"--configfile config/examples/{path.name}" in text
    if path.stem in ("agg", "agg_router", "disagg", "disagg_router"):
        assert config.deployment.topology == path.stem
        assert f"snakemake serve_{path.stem} " in text


def test_there_is_an_example_for_each_topology_and_set_of_gpus() -> None:
    assert {path.stem for path in EXAMPLES} >= {
        *("agg", "agg_router", "disagg", "disagg_router"),
        *("cpu", "one-gpu", "two-gpus", "tensorrt_llm-two-gpus"),
    }


def test_mock_engine_needs_neither_weights_nor_gpus() -> None:
    mock = parse({"engine": {"backend": "mock"}, "model": {"tokenizer": "bundled"}})
    assert mock.engine.weights == "dummy"
    assert parse(as_plain(mock)) == mock
    for raw, key in (
        ({"engine": {"backend": "mock", "device": "cuda"}}, "engine.device"),
        (
            {"engine": {"backend": "mock"}, "workers": {"tensor_parallel": {"agg": 2}}},
            "workers.tensor_parallel",
        ),
        ({"workers": {"instances_per_process": 2}}, "workers.instances_per_process"),
        ({"mock": {"speedup": 0}}, "mock.speedup"),
        ({"mock": {"step_s": -1}}, "mock.step_s"),
    ):
        assert refusal(raw).key == key


@pytest.mark.parametrize("other", [{"device": "cuda"}, {"backend": "tensorrt_llm"}])
def test_int8_is_for_the_torch_engine_on_cpu(other: dict[str, Any]) -> None:
    error = refusal({"engine": {"dtype": "int8", **other}})
    assert error.key == "engine.dtype"
    assert "engine.device: cpu" in error.remedy


@pytest.mark.parametrize(
    ("text", "key", "said"),
    [
        ("router: {policy: kvv}", "router.policy", "did you mean `kv`? choose one of: kv, "),
        ("engine: {dtype: flot32}", "engine.dtype", "did you mean `float32`? choose one of: "),
        (
            "cluster: {head_roles: [deco]}",
            "cluster.head_roles[0]",
            "choose one of: decode, prefill",
        ),
        ("router: {policy: no}", "router.policy", "choose one of: kv, "),
        ("model: {name: 007}", "model.name", "put it into quotes"),
        ("model: {aliases: foo}", "model.aliases", "write a list: [foo]"),
        ("workers: [1, 2]", "workers", "write its keys below it"),
        ("workers: {1: 2}", "workers", "quotes"),
        ("1: 2", "1", "a section is a word"),
        ("yes: 1", "True", "a section is a word"),
    ],
)
def test_yaml_that_means_something_else_is_refused_with_what_to_write(
    text: str, key: str, said: str
) -> None:
    error = refusal(yaml.safe_load(text))
    assert error.key == key
    assert said in error.remedy
