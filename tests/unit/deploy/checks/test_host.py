"""What a deployment needs of its machine."""

from pathlib import Path

import msgspec
import pytest
from serving.config import Config, parse
from serving.deploy.checks import host as checks_host
from serving.deploy.checks.findings import Finding
from serving.deploy.checks.host import HostFacts
from serving.errors import ConfigError
from unit.deploy.checks.finding_names import wrong

GIB = 1024**3
HOST = HostFacts(
    python=(3, 11),
    system="Linux",
    machine="x86_64",
    cores=8,
    memory_total=32 * GIB,
    memory_available=24 * GIB,
    disk_free=100 * GIB,
    open_files=65536,
    memlock=8192,
    has_infiniband=False,
    unix_socket_error="",
    loopback_error="",
)


def host(facts: HostFacts, config: Config | None = None, num_workers: int = 2) -> list[Finding]:
    return checks_host.judge_host(config or Config(), num_workers, "cpu", facts)


def test_good_host_has_nothing_wrong() -> None:
    assert wrong(host(HOST)) == {}


def test_this_machine_can_be_observed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    facts = checks_host.observe_host(Path("run"))
    assert facts.cores >= 1
    assert facts.memory_total > facts.memory_available > 0
    assert facts.loopback_error == facts.unix_socket_error == ""
    assert list(Path("run").iterdir()) == []


@pytest.mark.parametrize(
    ("change", "name", "blocks"),
    [
        ({"python": (3, 10)}, "python", True),
        ({"system": "Darwin"}, "platform", True),
        ({"cores": 1}, "cores", False),
        ({"memory_total": 2 * 10**9, "memory_available": 10**9}, "memory", True),
        ({"memory_available": 2 * 10**9}, "memory", False),
        ({"disk_free": 10**8}, "disk", True),
        ({"disk_free": 10**9}, "disk", False),
        ({"open_files": 1000}, "open files", False),
        ({"open_files": 100}, "open files", True),
        ({"has_infiniband": True}, "locked memory", False),
        ({"unix_socket_error": "Operation not permitted"}, "unix sockets", True),
        ({"loopback_error": "Network is unreachable"}, "loopback", True),
    ],
)
def test_each_shortage_is_found_and_has_a_remedy(
    change: dict[str, object], name: str, blocks: bool
) -> None:
    found = wrong(host(msgspec.structs.replace(HOST, **change)))
    assert set(found) == {name}
    assert found[name].blocks is blocks
    assert found[name].remedy


def test_nixl_is_only_needed_by_a_torch_deployment_that_uses_it() -> None:
    config = parse({"kv_transfer": {"transport": "nixl"}})
    assert not wrong(host(HOST))
    assert not wrong(host(msgspec.structs.replace(HOST, nixl="nixl_cu13"), config))
    found = wrong(host(HOST, config))["nixl"]
    assert found.blocks
    assert "pip install nixl-cu13" in found.remedy


def test_folder_that_refuses_sockets_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("a file where the folder should be")
    assert "File exists" in checks_host._try_unix_socket(tmp_path / "run")


@pytest.mark.parametrize(
    ("model", "dtype", "num_bytes"),
    [
        ("HuggingFaceTB/SmolLM2-135M-Instruct", "float32", 135 * 10**6 * 4),
        ("Qwen/Qwen2.5-0.5B-Instruct", "bfloat16", 10**9),
        ("Qwen/Qwen2.5-0.5B-Instruct", "int8", 5 * 10**8),
        ("org/nameless", "float32", None),
        ("org/Mixtral-8x7B", "float32", None),
    ],
)
def test_size_of_weights_is_taken_from_the_name(
    model: str, dtype: str, num_bytes: int | None
) -> None:
    config = parse({"model": {"id": model}, "engine": {"dtype": dtype}})
    assert checks_host.weight_bytes(config) == num_bytes


def test_size_of_a_local_model_is_that_of_its_files(tmp_path: Path) -> None:
    for name in ("config.json", "tokenizer.json"):
        (tmp_path / name).write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(bytes(1000))
    config = parse({"model": {"id": str(tmp_path)}})
    assert checks_host.weight_bytes(config) == 1004


def test_dummy_weights_are_not_looked_for_on_disk(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    config = parse({"model": {"id": str(tmp_path)}, "engine": {"weights": "dummy"}})
    assert checks_host.weight_bytes(config) is None


def test_missing_local_model_is_a_config_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"model\.id"):
        checks_host.weight_bytes(parse({"model": {"id": str(tmp_path / "none")}}))
