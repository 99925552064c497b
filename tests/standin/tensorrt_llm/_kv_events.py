"""Test code. KV cache events as the real engine writes them, from what the torch engine does.

Hashes here are this engine's own. Two things go beyond the torch engine: the last, partly filled
block of a finished request is stored too (and goes after a while), and with host memory an evicted
block is first reported as moved there.
"""

from __future__ import annotations

import json
import struct
from collections import OrderedDict, deque
from collections.abc import Sequence as Rows
from typing import Any

from serving.protocol import BlocksRemoved, BlocksStored, KvEvent
from xxhash import xxh3_64_intdigest

PRIORITY = 35
_MAX_PARTIAL = 8


class KvEvents:
    """`max_size` events wait to be read; when there are more, the oldest are lost."""

    def __init__(
        self, max_size: int, *, window_size: int, num_blocks: int, num_host_blocks: int = 0
    ) -> None:
        self._window_size, self._num_host_blocks = window_size, num_host_blocks
        self._waiting: deque[str] = deque(maxlen=max_size)
        self._next_id = 0
        self._tokens: dict[int, list[int]] = {}  # the torch engine's hash -> tokens of the block
        self._host: OrderedDict[int, None] = OrderedDict()
        # The torch engine's hash of the block before -> the partial block after it.
        self._partial: OrderedDict[int, tuple[int, int | None]] = OrderedDict()
        self._fresh: list[tuple[int | None, list[int]]] = []
        self._emit({"type": "created", "num_blocks_per_cache_level": [num_blocks, num_host_blocks]})

    def describe(self, block_hash: int, tokens: Rows[int]) -> None:
        """The tokens of a block that is about to be stored."""
        self._tokens[block_hash] = list(tokens)

    def end_partly(self, parent: int | None, tokens: Rows[int]) -> None:
        """A request ended with a block that is not full."""
        self._fresh.append((parent, list(tokens)))

    def translate(self, events: list[KvEvent]) -> None:
        """What the cache did in one step."""
        told: list[dict[str, Any]] = []
        for event in events:
            if isinstance(event, BlocksStored):
                self._stored(event, told)
            elif isinstance(event, BlocksRemoved):
                self._removed(event.block_hashes, told)
        for parent, tokens in self._fresh:
            self._store_partial(parent, tokens, told)
        self._fresh.clear()
        for data in told:
            self._emit(data)

    def take(self) -> list[str]:
        taken = list(self._waiting)
        self._waiting.clear()
        return taken

    def _stored(self, event: BlocksStored, told: list[dict[str, Any]]) -> None:
        run: list[int] = []
        parent = event.parent_hash
        for value in event.block_hashes:
            if value in self._host:  # computed again while a copy was in host memory
                del self._host[value]
                self._tell_run(parent, run, told)
                run, parent = [], value
                told.append(_moved(value, 1, 0))
            else:
                run.append(value)
        self._tell_run(parent, run, told)

    def _tell_run(self, parent: int | None, run: list[int], told: list[dict[str, Any]]) -> None:
        if run:
            blocks = [_block(own_hash(value), self._tokens[value]) for value in run]
            told.append(_store(None if parent is None else own_hash(parent), blocks))

    def _store_partial(
        self, parent: int | None, tokens: list[int], told: list[dict[str, Any]]
    ) -> None:
        parent_hash = None if parent is None else own_hash(parent)
        packed = struct.pack(f"<{len(tokens)}I", *tokens)
        value = xxh3_64_intdigest(struct.pack("<Q", parent_hash or 0) + packed)
        if value in self._partial:
            return
        self._partial[value] = (value, parent)
        block = _block(value, tokens)
        last = told[-1] if told else None
        follows = last and last["type"] == "stored" and last["blocks"][-1]["block_hash"]
        if follows and follows == parent_hash:
            assert last
            last["blocks"].append(block)
        else:
            told.append(_store(parent_hash, [block]))
        if len(self._partial) > _MAX_PARTIAL:
            oldest, _ = self._partial.popitem(last=False)
            told.append({"type": "removed", "block_hashes": [oldest]})

    def _removed(self, hashes: list[int], told: list[dict[str, Any]]) -> None:
        gone = []
        for value in hashes:
            if self._num_host_blocks:
                told.append(_moved(value, 0, 1))
                self._host[value] = None
                if len(self._host) <= self._num_host_blocks:
                    continue
                value, _ = self._host.popitem(last=False)
            gone.append(own_hash(value))
            self._tokens.pop(value, None)
            for partial, (_, parent) in list(self._partial.items()):
                if parent == value:
                    del self._partial[partial]
                    gone.append(partial)
        if gone:
            told.append({"type": "removed", "block_hashes": gone})

    def _emit(self, data: dict[str, Any]) -> None:
        event = {"event_id": self._next_id, "data": data, "window_size": self._window_size}
        self._next_id += 1
        self._waiting.append(json.dumps(event))


def own_hash(block_hash: int) -> int:
    """This engine's hash of a block: unsigned, 64 bits, half of them beyond a signed one."""
    return xxh3_64_intdigest(b"standin" + struct.pack("<Q", block_hash))


def _store(parent_hash: int | None, blocks: list[dict[str, Any]]) -> dict[str, Any]:
    return {"type": "stored", "parent_hash": parent_hash, "blocks": blocks}


def _block(value: int, tokens: list[int]) -> dict[str, Any]:
    return {
        "type": "stored_block",
        "block_hash": value,
        "tokens": [
            {"type": "unique_token", "token_id": token, "token_extra_id": 0} for token in tokens
        ],
        "cache_level": 0,
        "priority": PRIORITY,
    }


def _moved(block_hash: int, old: int, new: int) -> dict[str, Any]:
    return {
        "type": "updated",
        "block_hash": own_hash(block_hash),
        "cache_level": {"type": "event_diff", "new_value": new, "old_value": old},
        "priority": {"type": "event_diff", "new_value": PRIORITY, "old_value": PRIORITY},
    }
