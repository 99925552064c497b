"""A head and two nodes that join it. Each is a network namespace with an address of its own.

Everything is real. `pytest -s` shows how long it takes until a lost node is noticed, until it is
back, and until the head's etcd and NATS are back.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from integration.cluster.namespaces import copy_join_file, machines
from integration.cluster.network import answer_to
from integration.cluster.nodes import NUM_TOKENS, PROMPTS, Nodes
from integration.deployment import shared_memory
from integration.readme import snakemake_arguments
from waiting import wait_until

pytestmark = [pytest.mark.integration, pytest.mark.timeout(900)]

LEASE_S = 3
KV_BYTES_PER_TOKEN = 30 * 2 * 3 * 64 * 4
"""SmolLM2-135M: layers, K and V, heads, their size, float32."""
DECODE = "decode-10-213-8-1-0"
PREFILL, SECOND = "prefill-10-213-8-2-0", "prefill-10-213-8-3-0"


def long_prompt(seed: int) -> str:
    """About 700 tokens that no other prompt begins with."""
    return f"{seed} " + "The keeper of the lighthouse climbs the stairs and counts them. " * 50


@pytest.fixture(scope="module")
def nodes(tmp_path_factory: pytest.TempPathFactory, default_results: Path) -> Iterator[Nodes]:
    shm_before = shared_memory()
    with machines(3) as cluster:
        nodes = Nodes(cluster, tmp_path_factory.mktemp("cluster"), default_results)
        try:
            yield nodes
        finally:
            nodes.stop()
    assert not shared_memory() - shm_before


@pytest.fixture(scope="module")
def expected(nodes: Nodes) -> dict[str, str]:
    """What the head answers alone, by prompt: its decode worker computes everything."""
    output = nodes.start_head()
    assert "snakemake join" in output
    assert nodes.instances() == {DECODE}
    return dict(zip(PROMPTS, nodes.texts(), strict=True))


@pytest.fixture
def two(nodes: Nodes, expected: dict[str, str]) -> Nodes:
    """The head and one node, whatever the test before left."""
    if PREFILL not in nodes.instances():
        nodes.join(1)
    nodes.wait_for({DECODE, PREFILL}, 20)
    return nodes


def test_node_joins_and_tokens_stay_the_same(two: Nodes, expected: dict[str, str]) -> None:
    """The smoke test passes, greedy text is what one worker alone gives, and KV is on the link."""
    smoke = two.head.snakemake("smoke_test").stdout
    assert "over ucx (tcp)" in smoke
    before = two.machine(1).received_bytes(), two.machine(0).received_bytes()
    assert two.texts() == [expected[prompt] for prompt in PROMPTS]
    answer = two.head.complete(long_prompt(100))
    num_bytes = answer["usage"]["prompt_tokens"] // 16 * 16 * KV_BYTES_PER_TOKEN
    into_head = two.machine(0).received_bytes() - before[1]
    assert into_head >= num_bytes
    assert two.machine(1).received_bytes() - before[0] < num_bytes / 2  # it only goes one way
    print(f"\nKV of one prompt: {num_bytes / 1e6:.0f} MB, on the link: {into_head / 1e6:.0f} MB")


def test_second_run_on_each_node_is_a_no_op(two: Nodes) -> None:
    before = two.head.pids(), two.nodes[0].pids()
    two.head.snakemake("serve_disagg_multinode")
    two.join(1)
    assert (two.head.pids(), two.nodes[0].pids()) == before


def test_status_names_every_node(two: Nodes) -> None:
    _, status = snakemake_arguments("node", "")
    head, node = (d.snakemake(*status).stdout for d in (two.head, two.nodes[0]))
    for output in (head, node):
        assert DECODE in output
        assert PREFILL in output
    assert "not" not in node.split("worker-prefill")[1].splitlines()[0]
    assert two.head_address in node


def test_doctor_passes_on_every_node_and_the_smoke_test_runs_only_on_the_head(two: Nodes) -> None:
    for deployment in (two.head, two.nodes[0]):
        assert "nothing wrong in" in deployment.snakemake("doctor").stdout
    refused = two.nodes[0].snakemake("smoke_test", check=False)
    assert refused.returncode != 0
    assert f"works for {two.head_address}" in refused.stdout


@pytest.mark.parametrize(
    ("section", "key", "value"),
    [("engine", "block_size", 32), ("model", "id", "./elsewhere"), ("engine", "dtype", "bfloat16")],
)
def test_node_with_another_configuration_is_refused_with_the_difference(
    two: Nodes, section: str, key: str, value: Any
) -> None:
    stranger = two.nodes[1]
    whole = {name: dict(keys) for name, keys in stranger.config.items()}
    stranger.config.setdefault(section, {})[key] = value
    try:
        done = two.join(2, check=False)
    finally:
        stranger.config = whole
    assert done.returncode != 0
    assert f"{section}.{key}: {value!r} here, " in done.stdout
    assert "Traceback" not in done.stdout
    assert not stranger.processes()
    assert two.instances() == {DECODE, PREFILL}


def test_node_with_other_code_is_refused(two: Nodes, tmp_path: Path) -> None:
    """A checkout that differs by a line of the worker's code."""

    from integration import deployment

    checkout = tmp_path / "checkout"
    for name in ("scripts", "rules", "profiles"):
        shutil.copytree(deployment.REPO / name, checkout / name)
    shutil.copy(deployment.REPO / "Snakefile", checkout)
    with (checkout / "scripts" / "serving" / "block_hash.py").open("a") as source:
        source.write("\n# another commit\n")
    copy_join_file(two.head.directory, two.nodes[1].directory)
    where = f"{two.head_address}:{two.head.config['etcd']['port']}"
    command = ["-m", "snakemake", "join", "--cores", "all", "--config", f"cluster-head={where}"]
    done = subprocess.run(
        two.machine(2).inside(sys.executable, *command, "-s", str(checkout / "Snakefile")),
        cwd=two.nodes[1].directory,
        capture_output=True,
        text=True,
        timeout=60,
        env={k: v for k, v in os.environ.items() if k != "PYTHONPATH"},
    )
    assert done.returncode != 0
    assert "version: " in done.stderr, done.stderr
    assert "at the head" in done.stderr


def test_join_file_of_another_cluster_is_refused(two: Nodes) -> None:
    from serving.deploy.security import certificates

    file = two.nodes[1].directory / "join.pem"
    file.write_text(certificates.make_etcd_certificates().join)
    try:
        started = time.monotonic()
        done = two.join(2, check=False)
        assert time.monotonic() - started < 30
    finally:
        file.unlink()
    assert done.returncode != 0
    assert "join.pem is a copy of its run/secrets/join.pem" in done.stdout
    assert "Traceback" not in done.stdout


def test_clients_without_credentials_get_nothing_from_any_port_of_any_node(two: Nodes) -> None:
    """From a third machine, without any secret; and nothing listens everywhere.

    Before links are cut: garbage at UCX's own port, which lets nobody in who was not met, would
    crash libucx when one is mended. See "More than one machine" in docs/decisions.md.
    """
    secrets = [
        (folder.directory / "run" / "secrets" / name).read_bytes().strip()
        for folder in (two.head, two.nodes[0])
        for name in ("nats_token", "rpc_secret")
    ]
    before = two.head.pids(), two.nodes[0].pids()
    num_ports = 0
    shut: list[tuple[str, int]] = []
    for machine in (two.machine(0), two.machine(1)):
        listening = machine.python(
            "import psutil; print([tuple(c.laddr) for c in psutil.net_connections('tcp')"
            " if c.status == psutil.CONN_LISTEN])"
        )
        ports = {tuple(address) for address in eval(listening)}
        assert not {host for host, _ in ports} & {"0.0.0.0", "::"}, ports
        for host, port in sorted(ports):
            if host != machine.address:
                continue
            num_ports += 1
            for words in (os.urandom(2048), b"CONNECT {}\r\nPING\r\n", b"GET / HTTP/1.1\r\n\r\n"):
                try:
                    answer = answer_to((host, port), words)
                except TimeoutError:  # not even a connection
                    shut.append((host, port))
                    break
                assert b"PONG" not in answer
                assert not any(secret in answer for secret in secrets)
    assert {host for host, _ in shut} == {two.machine(0).address, two.machine(1).address}, "UCX's"
    assert num_ports >= 6  # API, NATS, etcd, RPC of both, KV of the prefill worker
    etcd = f"{two.head_address}:{two.head.config['etcd']['port']}"
    with pytest.raises(httpx.HTTPError):
        httpx.get(f"https://{etcd}/health", verify=False, timeout=5)
    assert httpx.get(f"{two.head.url}/ready", timeout=5).status_code == 401
    assert (two.head.pids(), two.nodes[0].pids()) == before
    assert two.instances() == {DECODE, PREFILL}
    assert two.texts(PROMPTS[:1])


def test_link_cut_during_a_transfer_falls_back_and_recovers(
    two: Nodes, expected: dict[str, str]
) -> None:
    """Answers are right and in time without the node; it comes back by itself."""
    node = two.machine(1)
    if not node.shape("tbf", "rate", "60mbit", "burst", "64kb", "latency", "400ms"):
        pytest.skip("this kernel has no token bucket filter to slow the link down with")
    prompts = [long_prompt(seed) for seed in range(2)]
    received = two.machine(0).received_bytes()
    pid = two.nodes[0].pids()
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        answers = [
            pool.submit(two.head.complete, prompt, max_tokens=NUM_TOKENS) for prompt in prompts
        ]
        wait_until(lambda: two.machine(0).received_bytes() >= received + 4e6, 30, "KV is sent")
        assert not any(answer.done() for answer in answers)
        node.cut()
        started = time.monotonic()
        try:
            noticed_s = two.wait_for({DECODE}, 3 * LEASE_S)
            texts = [answer.result(60)["choices"][0]["text"] for answer in answers]
            answered_s = time.monotonic() - started
        finally:
            node.unshape()
            node.mend(two.cluster.bridge)
    back_s = two.wait_for({DECODE, PREFILL}, 30)
    assert two.nodes[0].pids() == pid
    assert two.texts() == [expected[prompt] for prompt in PROMPTS]
    assert two.texts(prompts) == texts
    assert_nothing_held(two)
    print(
        f"\nlink cut: noticed within {noticed_s:.1f} s, answers after {answered_s:.1f} s, "
        f"back {back_s:.1f} s after it was mended"
    )


def assert_nothing_held(two: Nodes) -> None:
    """No block is active anywhere once nothing runs."""
    two.head.wait(
        "every block is free again",
        lambda r: (
            r["instances"]
            and all(
                row["active_blocks"] == 0 and row["num_running"] == 0 and row["num_waiting"] == 0
                for row in r["instances"]
            )
        ),
        deadline_s=20,  # what nobody fetches is held for ten seconds
    )


def test_flapping_link_loses_no_answer(two: Nodes, expected: dict[str, str]) -> None:
    """A link that fails for a moment again and again: answers stay right, and all of them come."""
    stop = threading.Event()

    def flap() -> None:
        while not stop.wait(0.7):
            two.machine(1).cut()
            stop.wait(0.4)
            two.machine(1).mend(two.cluster.bridge)

    flapping = threading.Thread(target=flap)
    flapping.start()
    try:
        for _ in range(3):
            assert two.texts() == [expected[prompt] for prompt in PROMPTS]
    finally:
        stop.set()
        flapping.join()
    two.wait_for({DECODE, PREFILL}, 30)
    assert_nothing_held(two)


def test_lossy_and_slow_link_loses_no_answer(two: Nodes, expected: dict[str, str]) -> None:
    """30% of the packets lost and 100 ms of delay."""
    if not two.machine(1).shape("netem", "loss", "30%", "delay", "100ms"):
        pytest.skip("this kernel has no netem")
    try:
        assert two.texts() == [expected[prompt] for prompt in PROMPTS]
    finally:
        two.machine(1).unshape()
    two.wait_for({DECODE, PREFILL}, 30)


def test_killed_node_is_noticed_and_joins_again(two: Nodes, expected: dict[str, str]) -> None:
    """The plug is pulled and every process there dies: nobody says goodbye."""
    two.machine(1).cut()
    for process in two.nodes[0].processes():
        with contextlib.suppress(psutil.Error):
            process.kill()
    started = time.monotonic()
    assert two.texts() == [expected[prompt] for prompt in PROMPTS]
    two.wait_for({DECODE}, 20)
    noticed_s = time.monotonic() - started
    two.machine(1).mend(two.cluster.bridge)
    started = time.monotonic()
    two.join(1)
    two.wait_for({DECODE, PREFILL}, 20)
    print(
        f"\nnode killed: gone within {noticed_s:.1f} s; joined in {time.monotonic() - started:.1f} s"
    )
    assert noticed_s < 3 * LEASE_S
    assert two.texts() == [expected[prompt] for prompt in PROMPTS]


def test_restarted_etcd_and_nats_of_the_head_lose_no_request(
    two: Nodes, expected: dict[str, str]
) -> None:
    """Requests go on without etcd and NATS, and the other node finds them again by itself."""
    pids = two.nodes[0].pids()
    for name in ("etcd", "nats"):
        os.kill(two.head.pids()[name], signal.SIGKILL)
    assert two.texts() == [expected[prompt] for prompt in PROMPTS]
    started = time.monotonic()
    two.head.snakemake("serve_disagg_multinode")
    two.wait_for({DECODE, PREFILL}, 20)
    two.head.wait("events flow again", lambda r: all(row["synchronised"] for row in r["instances"]))
    print(
        f"\netcd and NATS killed: whole again {time.monotonic() - started:.1f} s after the command"
    )
    assert two.nodes[0].pids() == pids
    assert two.texts() == [expected[prompt] for prompt in PROMPTS]
    two.join(1)  # the head publishes its settings again, too


def test_third_node_joins_and_drains(two: Nodes, expected: dict[str, str]) -> None:
    """Three nodes; one leaves while it is asked, and nothing is lost."""
    two.join(2)
    two.wait_for({DECODE, PREFILL, SECOND}, 20)
    prompts = [f"{number}. {prompt}" for number in range(2) for prompt in PROMPTS]
    whole = two.texts(prompts)
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        answers = pool.submit(two.texts, prompts)
        left = two.nodes[1].snakemake("stop").stdout
        assert answers.result(120) == whole
    assert "nothing is left" in left
    assert two.instances() == {DECODE, PREFILL}
    assert not two.nodes[1].processes()
