"""Metrics of several processes on one page."""

from __future__ import annotations

import asyncio

from prometheus_client.parser import text_string_to_metric_families
from serving.frontend.metrics.pages import join_pages, merge
from serving.frontend.metrics.registry import Metrics


def test_each_sample_has_its_process_and_each_metric_one_heading() -> None:
    pages = {}
    for number in (0, 1):
        metrics = Metrics()
        metrics.prompt_tokens.add(10 + number)
        metrics.requests.add(1, "chat", "200", "stop")
        metrics.time_to_first_token.observe(0.02)
        pages[number] = metrics.render()
    families = list(text_string_to_metric_families(merge(pages).decode()))
    assert len({family.name for family in families}) == len(families)
    samples = [sample for family in families for sample in family.samples]
    assert len(samples) == 2 * sum(
        len(f.samples) for f in text_string_to_metric_families(pages[0].decode())
    )
    values = {
        s.labels["process"]: s.value for s in samples if s.name == "serving_prompt_tokens_total"
    }
    assert values == {"0": 10, "1": 11}
    labels = next(s.labels for s in samples if s.name == "serving_requests_total")
    assert labels == {
        "process": "0",
        "endpoint": "chat",
        "status": "200",
        "finish_reason": "stop",
    }


async def test_process_that_does_not_answer_is_left_out() -> None:
    async def close(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.close()

    async with await asyncio.start_server(close, "127.0.0.1", 0) as broken:
        port = broken.sockets[0].getsockname()[1]
        page = await join_pages(Metrics().render(), 0, {1: port, 2: 1})
    assert b'process="0"' in page
    assert b'process="1"' not in page
