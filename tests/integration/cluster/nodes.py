"""A head and the nodes that join it, each deployed on a machine of its own."""

from __future__ import annotations

import concurrent.futures
import contextlib
import subprocess
import time
from pathlib import Path

import psutil
from integration.cluster.namespaces import Cluster, Machine, copy_join_file
from integration.deployment import Deployment, share_results
from integration.readme import snakemake_arguments

STOP_S = 6
NUM_TOKENS = 8
PROMPTS = ["The capital of France is", "def fibonacci(n):", "Roses are red, violets are"]


class Nodes:
    """The head, the nodes that join it, and the machines that they are."""

    def __init__(self, cluster: Cluster, folder: Path, results: Path) -> None:
        self.cluster = cluster
        head, *others = cluster.machines
        self.head = Deployment(
            folder / "head",
            frontend={"host": head.address},
            deadlines={"token_s": 5, "prefill_s": 60},
            kv_transfer={"transfer_s": 5, "hold_s": 10},
            deployment={"stop_s": STOP_S},
        )
        port = self.head.config["frontend"]["port"]
        self.head.url = f"http://{head.address}:{port}"
        self.head.prefix = head.inside()
        self.nodes: list[Deployment] = []
        for machine in others:
            node = Deployment(folder / machine.namespace, deployment={"stop_s": STOP_S})
            node.prefix = machine.inside()
            self.nodes.append(node)
        for deployment in (self.head, *self.nodes):
            share_results(results, deployment.directory / "results")

    @property
    def head_address(self) -> str:
        return self.cluster.machines[0].address

    def start_head(self) -> str:
        [command] = snakemake_arguments("head", self.head_address)
        output = self.head.snakemake(*command).stdout
        self.head.config["cluster"] = {"address": f"{self.head_address}/32"}  # from now on
        key = (self.head.directory / "run" / "secrets" / "api_keys").read_text().strip()
        self.head.headers = {"authorization": f"Bearer {key}"}
        return output

    def join(self, number: int, *more: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        """Node `number` (1, 2, ...) joins, as the head's invitation says."""
        node = self.nodes[number - 1]
        if not (node.directory / "join.pem").exists():
            copy_join_file(self.head.directory, node.directory)
        where = f"{self.head_address}:{self.head.config['etcd']['port']}"
        return node.snakemake(*snakemake_arguments("node", where)[0], *more, check=check)

    def machine(self, number: int) -> Machine:
        return self.cluster.machines[number]

    def instances(self) -> set[str]:
        return {row["instance_id"] for row in self.head.ready()["instances"]}

    def wait_for(self, expected: set[str], deadline_s: float) -> float:
        """Until exactly these are routed to; returns how long it took."""
        started = time.monotonic()
        self.head.wait(
            f"{expected} are routed to",
            lambda r: {row["instance_id"] for row in r["instances"]} == expected,
            deadline_s,
        )
        return time.monotonic() - started

    def texts(self, prompts: list[str] | None = None) -> list[str]:
        with concurrent.futures.ThreadPoolExecutor(4) as pool:
            asked = prompts or PROMPTS
            answers = list(pool.map(lambda p: self.head.complete(p, max_tokens=NUM_TOKENS), asked))
        return [answer["choices"][0]["text"] for answer in answers]

    def stop(self) -> None:
        for deployment in (*self.nodes, self.head):
            done = deployment.snakemake("stop", check=False)
            left = deployment.processes()
            for process in left:
                with contextlib.suppress(psutil.Error):
                    process.kill()
            assert done.returncode == 0, done.stdout
            assert not left, left
