"""One page with the metrics of several processes or models. A label of each sample names its own.

Prometheus' text format requires all samples of a metric together, under one heading.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Mapping

OWN_PATH = "/metrics/process"
ANSWER_S = 1.0


async def join_pages(
    own: bytes, number: int, peer_ports: Mapping[int, int], authorization: str = ""
) -> bytes:
    """The page `own` of process `number`, joined with the pages of its peers.

    `peer_ports` maps process numbers to loopback ports. Peers get the `authorization` header of the
    request. A peer that does not answer is left out: it is being replaced, and its counters start
    again.
    """
    pages = await asyncio.gather(*(_page(port, authorization) for port in peer_ports.values()))
    return merge(
        {number: own} | {n: page for n, page in zip(peer_ports, pages, strict=True) if page}
    )


def merge(pages: Mapping[int, bytes]) -> bytes:
    """Join pages by process number."""
    return join_labelled(
        (label("process", str(number)), page) for number, page in sorted(pages.items())
    )


def label(name: str, value: str) -> str:
    """A label as it stands in a sample."""
    escaped = value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
    return f'{name}="{escaped}"'


def join_labelled(pages: Iterable[tuple[str, bytes]]) -> bytes:
    """One page of several. Each sample gets the label of its page, or none where that is empty."""
    headings: dict[str, list[str]] = {}
    samples: dict[str, list[str]] = {}
    for own_label, page in pages:
        family, is_new = "", False
        for line in page.decode().splitlines():
            if line.startswith("# "):
                _, kind, family, *_ = line.split(" ", 3)
                if kind == "HELP":
                    is_new = family not in headings
                if is_new:
                    headings.setdefault(family, []).append(line)
            elif line:
                samples.setdefault(family, []).append(_labelled(line, own_label))
    lines = [
        line
        for family, heading in headings.items()
        for line in (*heading, *samples.get(family, ()))
    ]
    return ("\n".join(lines) + "\n").encode()


def _labelled(sample: str, own_label: str) -> str:
    if not own_label:
        return sample
    name, brace, rest = sample.partition("{")
    if brace:
        return f"{name}{{{own_label},{rest}"
    name, _, value = sample.partition(" ")
    return f"{name}{{{own_label}}} {value}"


async def _page(port: int, authorization: str) -> bytes:
    """Empty if there is no answer in time."""
    try:
        async with asyncio.timeout(ANSWER_S):
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            try:
                head = f"GET {OWN_PATH} HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n"
                key = f"authorization: {authorization}\r\n" if authorization else ""
                writer.write(f"{head}{key}\r\n".encode())
                answer, _, body = (await reader.read(-1)).partition(b"\r\n\r\n")
            finally:
                writer.close()
    except (OSError, TimeoutError):
        return b""
    return body if b" 200 " in answer.partition(b"\r\n")[0] else b""
