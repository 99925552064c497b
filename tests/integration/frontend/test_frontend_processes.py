"""Two frontend processes behind one port: both serve, count, and are replaced when they die."""

from __future__ import annotations

import asyncio
import os
import signal
from collections import Counter
from pathlib import Path

import httpx
import psutil
import pytest
from integration.frontend.mock_service import make_service
from prometheus_client.parser import text_string_to_metric_families
from waiting import wait_until

pytestmark = [pytest.mark.integration, pytest.mark.timeout(120)]


def test_four_frontend_processes_spread_a_burst_over_all_workers(tmp_path: Path) -> None:
    """Eight prompts at once to eight idle workers: by chance, all are apart once in 400 bursts."""
    slow = {"mock": {"prefill_tokens_per_s": 3000.0}, "frontend": {"processes": 4}}
    with make_service(tmp_path, num_instances=8, **slow) as service:
        url = f"http://127.0.0.1:{service.port}"

        def routed() -> Counter[str]:
            page = httpx.get(f"{url}/metrics", timeout=15).text
            counts: Counter[str] = Counter()
            for family in text_string_to_metric_families(page):
                for sample in family.samples:
                    if sample.name == "serving_routed_requests_total":
                        counts[sample.labels["instance"]] += int(sample.value)
            return counts

        async def ask(client: httpx.AsyncClient, burst: int, number: int) -> None:
            prompt = [3 + (burst * 8 + number + place) % 200 for place in range(900)]
            body = {"model": "tiny", "prompt": prompt, "max_tokens": 1}
            response = await client.post(f"{url}/v1/completions", json=body)
            assert response.status_code == 200

        async def bursts() -> list[int]:
            """Workers that were asked, in each."""
            numbers = []
            # A connection for each request, so that the kernel spreads them.
            limits = httpx.Limits(max_keepalive_connections=0)
            async with httpx.AsyncClient(timeout=30, limits=limits) as client:
                for burst in range(8):
                    before = routed()
                    await asyncio.gather(*(ask(client, burst, number) for number in range(8)))
                    numbers.append(len(routed() - before))
                    await asyncio.sleep(0.3)  # until all have reported that they are idle
            return numbers

        asked = asyncio.run(bursts())
        processes = {httpx.get(f"{url}/ready").json()["process"] for _ in range(40)}
        assert len(processes) > 1
        assert sum(number == 8 for number in asked) >= 4, asked


def test_both_processes_serve_and_a_killed_one_is_replaced(tmp_path: Path) -> None:
    with make_service(tmp_path, deployment={"silent_s": 2}) as service:
        url = f"http://127.0.0.1:{service.port}"
        parent = psutil.Process(service.pids()["frontend"])

        def get(path: str) -> httpx.Response:
            return httpx.get(url + path, timeout=15)  # a connection of its own

        def who_answers() -> set[int]:
            states = [get("/ready") for _ in range(16)]
            return {s.json()["process"] for s in states if s.status_code == 200}

        def ask() -> int:
            body = {"model": "tiny", "prompt": "One two", "max_tokens": 4}
            return httpx.post(f"{url}/v1/completions", json=body, timeout=15).status_code

        def counted() -> dict[str, float]:
            families = text_string_to_metric_families(get("/metrics").text)
            return {
                sample.labels["process"]: sample.value
                for family in families
                for sample in family.samples
                if sample.name == "serving_requests_total"
            }

        wait_until(lambda: who_answers() == {0, 1})
        assert {ask() for _ in range(16)} == {200}
        found = counted()
        assert set(found) == {"0", "1"}
        assert sum(found.values()) == 16
        children = {child.pid for child in parent.children()}
        assert len(children) == 2
        victim = min(children)
        os.kill(victim, signal.SIGKILL)
        wait_until(lambda: len({c.pid for c in parent.children()} - children) == 1)
        wait_until(lambda: who_answers() == {0, 1})
        assert {ask() for _ in range(16)} == {200}
        children = {child.pid for child in parent.children()}
        os.kill(max(children), signal.SIGSTOP)  # its connections would wait for ever
        wait_until(lambda: len({c.pid for c in parent.children()} - children) == 1)
        wait_until(lambda: who_answers() == {0, 1})
        children = {child.pid for child in parent.children()}
    wait_until(lambda: not any(psutil.pid_exists(pid) for pid in children))
