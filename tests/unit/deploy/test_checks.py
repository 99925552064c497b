"""Checks: what they conclude from what was seen, and how a failing one ends."""

import socket
from pathlib import Path

import msgspec
import pytest
from serving.config import Config, parse
from serving.deploy.checks import gpu as checks_gpu
from serving.deploy.checks import host as checks_host
from serving.deploy.checks import ports as checks_ports
from serving.deploy.checks import ucx as checks_ucx
from serving.deploy.checks.findings import CheckResult, Finding, conclude, judge, render
from serving.deploy.checks.gpu import TorchFacts, TorchGpu
from serving.deploy.checks.host import HostFacts
from serving.deploy.checks.ucx import UcxFacts
from serving.deploy.rule_script import reporting
from serving.errors import ConfigError, OperatorError

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
H100 = TorchGpu("H100", "sm_90", 78 * GIB, 80 * GIB, True)
ONE_GPU = TorchFacts(driver="580.95", version="2.13.0", cuda="13.0", gpus=[H100])


def quiet(line: str) -> None:
    """What a check says to a person is not under test."""


def host(facts: HostFacts, config: Config | None = None, num_workers: int = 2) -> list[Finding]:
    return checks_host.judge_host(config or Config(), num_workers, "cpu", facts)


def wrong(findings: list[Finding]) -> dict[str, Finding]:
    return {finding.name: finding for finding in findings if not finding.ok}


# --- reports -----------------------------------------------------------------------------------


def test_warning_does_not_fail_a_check_but_a_blocking_finding_does() -> None:
    warning = Finding("a", False, "low", "raise it", warning=True)
    assert judge("check", [warning]).ok
    assert not judge("check", [warning, Finding("b", False, "gone")]).ok


def test_report_is_written_and_told_even_when_the_check_fails(tmp_path: Path) -> None:
    path, said = tmp_path / "checks" / "host.json", []
    findings = [
        Finding("disk", False, "1 GB free", "free some"),
        Finding("cores", False, "1 core", "get more", warning=True),
    ]
    with pytest.raises(OperatorError) as caught:
        conclude(judge("check_host", findings), path, report=said.append)
    assert caught.value.what == "check_host failed: disk: 1 GB free"
    assert caught.value.remedy == "free some"
    assert said == [f"check_host: {render(findings[1])}"]
    assert msgspec.json.decode(path.read_bytes(), type=CheckResult).checks == findings


def test_operator_error_ends_a_rule_script_with_one_paragraph(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    log = tmp_path / "logs" / "check.log"

    def script() -> None:
        with reporting(log) as report:
            report("looking")
            raise OperatorError("no room", remedy="make some")

    with pytest.raises(SystemExit) as caught:
        script()
    assert caught.value.code == 1
    printed = capsys.readouterr()
    assert printed.out == "looking\n"
    assert printed.err == "\nno room\n  -> make some\n\n"
    assert log.read_text() == "looking\nno room\n  -> make some\n"


def test_other_errors_keep_their_traceback(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), reporting(tmp_path / "log"):
        raise ZeroDivisionError


# --- host --------------------------------------------------------------------------------------


def test_good_host_has_nothing_wrong() -> None:
    assert wrong(host(HOST)) == {}


def test_this_machine_can_be_observed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    facts = checks_host.observe(Path("run"))
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


def test_folder_that_refuses_sockets_is_told(tmp_path: Path) -> None:
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
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(bytes(1000))
    config = parse({"model": {"id": str(tmp_path)}})
    assert checks_host.weight_bytes(config) == 1002


def test_dummy_weights_are_not_looked_for_on_disk(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    config = parse({"model": {"id": str(tmp_path)}, "engine": {"weights": "dummy"}})
    assert checks_host.weight_bytes(config) is None


def test_missing_local_model_is_a_config_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"model\.id"):
        checks_host.weight_bytes(parse({"model": {"id": str(tmp_path / "none")}}))


def test_port_held_by_a_stranger_is_found_by_its_key(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        config = parse({"frontend": {"port": port}})
        found = wrong(checks_ports.judge_ports(config, tmp_path / "run"))
    assert found["frontend.port"].blocks
    assert str(port) in found["frontend.port"].detail
    assert "frontend.port" in found["frontend.port"].remedy


# --- gpu ---------------------------------------------------------------------------------------


def test_cpu_engine_needs_no_gpu() -> None:
    (finding,) = checks_gpu.not_needed("cpu")
    assert finding.ok


def test_gpu_that_fits_two_workers_is_fine() -> None:
    assert wrong(checks_gpu.judge_gpu([0, 0], 16 * GIB, ONE_GPU)) == {}


def test_weights_that_cannot_fit_block_and_a_busy_gpu_warns() -> None:
    assert wrong(checks_gpu.judge_gpu([0, 0], 60 * GIB, ONE_GPU))["gpu 0"].blocks
    busy = msgspec.structs.replace(ONE_GPU, gpus=[msgspec.structs.replace(H100, free_bytes=GIB)])
    assert wrong(checks_gpu.judge_gpu([0], 16 * GIB, busy))["gpu 0"].warning


def test_gpu_torch_does_not_see_blocks() -> None:
    assert wrong(checks_gpu.judge_gpu([0, 1], None, ONE_GPU))["gpu 1"].blocks


def test_wrong_arithmetic_blocks() -> None:
    sick = msgspec.structs.replace(ONE_GPU, gpus=[msgspec.structs.replace(H100, works=False)])
    assert "matrix product" in wrong(checks_gpu.judge_gpu([0], None, sick))["gpu 0"].detail


def test_cpu_build_of_torch_is_told_from_a_missing_driver() -> None:
    found = wrong(checks_gpu.judge_gpu([0], None, TorchFacts(driver="", version="2.13.0+cpu")))
    assert "without CUDA" in found["torch"].detail
    assert "CUDA build" in found["torch"].remedy
    assert found["driver"].blocks


# --- ucx ---------------------------------------------------------------------------------------

UCX = UcxFacts(
    version="ucxx-cu13 0.52", equal=True, num_bytes=4 << 20, seconds=0.01, transports=["tcp/lo"]
)


def test_working_ucx_is_fine_and_its_transports_are_named() -> None:
    findings = checks_ucx.judge_ucx(Config(), True, UCX)
    assert wrong(findings) == {}
    assert findings[-1].detail == "tcp/lo"


@pytest.mark.parametrize(
    "facts",
    [
        UcxFacts(version="", error="the Python package ucxx is not installed"),
        msgspec.structs.replace(UCX, equal=False),
    ],
)
def test_broken_ucx_blocks_only_where_kv_travels_over_it(facts: UcxFacts) -> None:
    tcp = parse({"kv_transfer": {"transport": "tcp"}})
    assert not judge("ucx", checks_ucx.judge_ucx(Config(), True, facts)).ok
    assert judge("ucx", checks_ucx.judge_ucx(Config(), False, facts)).ok
    assert judge("ucx", checks_ucx.judge_ucx(tcp, True, facts)).ok


def test_transports_are_read_from_what_ucx_logs(tmp_path: Path) -> None:
    log = tmp_path / "ucx.log"
    log.write_text("x UCX INFO inter-node cfg#2 tag(tcp/lo posix/memory)  am(tcp/eth0)\n")
    assert checks_ucx._transports(log) == ["posix/memory", "tcp/lo"]
