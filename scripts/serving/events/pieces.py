"""Cuts KV events and snapshots into messages of limited size, and joins the parts of snapshots."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from msgspec import Struct

from serving.protocol import BlocksRemoved, BlocksStored, KvEvent, KvSnapshotPart

# Upper bounds, in msgpack: a 64-bit hash, an event without its hashes, and the rest of a message.
_HASH_BYTES = 9
_EVENT_BYTES = 32
_ENVELOPE_BYTES = 1024


class KvSnapshot(Struct, frozen=True):
    """All block hashes that an instance held when it had published `seq`, by tier."""

    instance_id: str
    epoch: int
    seq: int
    block_hashes: list[int]
    host_hashes: list[int] = []


def split_events(events: Sequence[KvEvent], max_payload: int) -> list[list[KvEvent]]:
    """Groups of events, in order, each small enough for one message of `max_payload` bytes.

    A run of stored blocks that is cut stays chained: the parent of the second piece is the last
    block of the first.
    """
    room = limit = max_payload - _ENVELOPE_BYTES
    groups: list[list[KvEvent]] = [[]]
    for event in events:
        rest: KvEvent | None = event
        while rest is not None:
            fits = (room - _EVENT_BYTES) // _HASH_BYTES
            size = _num_hashes(rest)
            if size > fits and room < limit:
                groups.append([])
                room = limit
                continue
            head, rest = _cut(rest, max(1, fits))
            groups[-1].append(head)
            room -= _EVENT_BYTES + _HASH_BYTES * _num_hashes(head)
    return [group for group in groups if group]


def _num_hashes(event: KvEvent) -> int:
    return len(event.block_hashes) if isinstance(event, BlocksStored | BlocksRemoved) else 0


def _cut(event: KvEvent, at: int) -> tuple[KvEvent, KvEvent | None]:
    if _num_hashes(event) <= at:
        return event, None
    if isinstance(event, BlocksStored):
        head = event.block_hashes[:at]
        rest = BlocksStored(head[-1], event.block_hashes[at:], event.tier)
        return BlocksStored(event.parent_hash, head, event.tier), rest
    assert isinstance(event, BlocksRemoved), "only events with hashes are cut"
    head, tail = event.block_hashes[:at], event.block_hashes[at:]
    return BlocksRemoved(head, event.tier), BlocksRemoved(tail, event.tier)


def snapshot_parts(snapshot: KvSnapshot, max_payload: int) -> list[KvSnapshotPart]:
    """At least one part, each small enough for one message of `max_payload` bytes."""
    size = (max_payload - _ENVELOPE_BYTES) // _HASH_BYTES
    device, host = snapshot.block_hashes, snapshot.host_hashes
    num_parts = max(1, -(-(len(device) + len(host)) // size))
    parts = []
    for part in range(num_parts):
        first, end = part * size, (part + 1) * size
        on_host = host[max(0, first - len(device)) : max(0, end - len(device))]
        head = (snapshot.instance_id, snapshot.epoch, snapshot.seq, part, num_parts)
        parts.append(KvSnapshotPart(*head, device[first:end], on_host))
    return parts


class SnapshotParts:
    """Joins the parts of one reply. A part of a newer epoch or seq starts a new reply."""

    def __init__(self, answer: asyncio.Future[KvSnapshot]) -> None:
        self._answer = answer
        self._version = (-1, -1)
        self._parts: dict[int, KvSnapshotPart] = {}

    def add(self, part: KvSnapshotPart) -> None:
        version = (part.epoch, part.seq)
        if version > self._version:
            self._version, self._parts = version, {}
        if version != self._version or self._answer.done():
            return
        self._parts[part.part] = part
        if len(self._parts) == part.num_parts:
            parts = [self._parts[number] for number in sorted(self._parts)]
            hashes = [block for part in parts for block in part.block_hashes]
            on_host = [block for part in parts for block in part.host_hashes]
            self._answer.set_result(KvSnapshot(part.instance_id, *version, hashes, on_host))

    def fail(self, error: Exception) -> None:
        if not self._answer.done():
            self._answer.set_exception(error)
            self._answer.exception()
