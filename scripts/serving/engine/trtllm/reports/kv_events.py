"""TensorRT-LLM's KV events as ours: its block hashes stay here, ours are made from the tokens.

A stored event names its blocks and their parent by the engine's own hashes, so this module keeps
the map from those to ours. The format is that of `KVCacheEventSerializer`: one object per event,
`{event_id, data, window_size[, attention_dp_rank]}`. There is no snapshot to ask for: when events
were lost, all blocks of that rank are removed, and come back as later events name them.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from typing import Any

from msgspec import Struct

from serving import block_hash
from serving.protocol import BlocksCleared, BlocksRemoved, BlocksStored, KvEvent

log = logging.getLogger(__name__)

_UNSIGNED = 2**64 - 1


class _Known(Struct, frozen=True):
    """An engine block's hash among ours, and the engine's hash of its parent."""

    block_hash: int
    parent: int | None


class _Rank:
    """One attention-DP rank: its own sequence of events over its own blocks.

    `known` also keeps blocks whose presence became uncertain with the last gap: a later child
    of one proves that it is still there, as parents outlive their children.
    """

    def __init__(self) -> None:
        self.last_id: int | None = None
        self.window: int | None = None
        self.known: dict[int, _Known] = {}
        self.present: set[int] = set()


class KvEventTranslator:
    """`feed` it every event in order. `block_size` in tokens; `salt` is the manifest's."""

    def __init__(self, block_size: int, salt: str) -> None:
        self._block_size = block_size
        self._root = block_hash.root_hash(salt)
        self._ranks: dict[int, _Rank] = {}
        self._holders: dict[int, int] = {}  # our hash -> engine blocks that it names
        self.num_blocks_by_level: list[int] | None = None  # of the largest window
        self.num_gaps = 0
        self.num_orphans = 0

    def present(self) -> Iterable[int]:
        """Our hashes of all blocks that are there."""
        return self._holders.keys()

    def feed(self, event: Mapping[str, Any]) -> list[KvEvent]:
        """What `event` changes for routing, often nothing."""
        rank = self._ranks.setdefault(event.get("attention_dp_rank") or 0, _Rank())
        changes: list[KvEvent] = []
        event_id = event["event_id"]
        if rank.last_id is not None:
            if event_id <= rank.last_id:
                return changes
            if event_id != rank.last_id + 1:
                self.num_gaps += 1
                log.warning("%d KV events were lost", event_id - rank.last_id - 1)
                changes += self._forget(rank)
        rank.last_id = event_id
        data = event["data"]
        if not self._is_largest_window(rank, event.get("window_size"), data, changes):
            return changes
        match data["type"]:
            case "stored":
                changes += self._stored(rank, data)
            case "removed":
                changes += self._removed(rank, data["block_hashes"])
            # "updated" moves a block between GPU and host: it can be reused from either.
        return changes

    def _is_largest_window(
        self, rank: _Rank, window: int | None, data: Mapping[str, Any], changes: list[KvEvent]
    ) -> bool:
        """A model with sliding windows has events for each; only the largest holds whole prefixes."""
        if window is not None and window != rank.window:
            if rank.window is not None and window < rank.window:
                return False
            if rank.present:
                changes += self._forget(rank)
            rank.known.clear()
            rank.window = window
        if data["type"] == "created":
            self.num_blocks_by_level = list(data["num_blocks_per_cache_level"])
        return True

    def _stored(self, rank: _Rank, data: Mapping[str, Any]) -> list[KvEvent]:
        blocks = self._full_blocks(data.get("blocks") or [])
        if not blocks:
            return []
        changes: list[KvEvent] = []
        parent_key = _unsigned(data.get("parent_hash"))
        parent: int | None = None
        if parent_key is not None:
            revived = self._revive(rank, parent_key)
            if revived is None:
                self.num_orphans += len(blocks)
                return []
            changes += revived
            parent = rank.known[parent_key].block_hash
        tokens = [token for _, block in blocks for token in block]
        hashes = block_hash.chain(
            tokens, self._block_size, self._root if parent is None else parent
        )
        fresh: list[int] = []  # a run of new blocks, and the parent of its first
        fresh_parent = parent
        for (key, _), ours in zip(blocks, hashes, strict=True):
            if self._hold(rank, key, _Known(ours, parent_key)):
                fresh.append(ours)
            else:
                if fresh:
                    changes.append(BlocksStored(fresh_parent, fresh))
                fresh, fresh_parent = [], ours
            parent_key = key
        if fresh:
            changes.append(BlocksStored(fresh_parent, fresh))
        return changes

    def _full_blocks(self, blocks: list[Mapping[str, Any]]) -> list[tuple[int, list[int]]]:
        """(engine's hash, tokens) up to the first block that has no hash among ours.

        Those are partial blocks, which the engine stores too, and blocks whose content is more
        than their token ids (`token_extra_id`). Nothing can follow them. Their hashes stay unknown,
        so that their removal has no effect either.
        """
        full = []
        for block in blocks:
            tokens = block["tokens"]
            if len(tokens) != self._block_size or any(t.get("token_extra_id") for t in tokens):
                break
            key = _unsigned(block["block_hash"])
            assert key is not None, "a block has a hash"
            full.append((key, [t["token_id"] for t in tokens]))
        return full

    def _removed(self, rank: _Rank, keys: list[int]) -> list[KvEvent]:
        gone = []
        for signed in keys:
            key = _unsigned(signed)
            assert key is not None, "a block has a hash"
            known = rank.known.pop(key, None)
            if known is not None and key in rank.present:
                rank.present.discard(key)
                gone += self._release(known.block_hash)
        return [BlocksRemoved(gone)] if gone else []

    def _revive(self, rank: _Rank, key: int | None) -> list[KvEvent] | None:
        """Make sure that `key` and its ancestors count as present. None when one is unknown."""
        missing: list[tuple[int, _Known]] = []
        while key is not None and key not in rank.present:
            known = rank.known.get(key)
            if known is None:
                return None
            missing.append((key, known))
            key = known.parent
        parent = None if key is None else rank.known[key].block_hash
        changes: list[KvEvent] = []
        for missed, known in reversed(missing):
            if self._hold(rank, missed, known):
                changes.append(BlocksStored(parent, [known.block_hash]))
            parent = known.block_hash
        return changes

    def _hold(self, rank: _Rank, key: int, known: _Known) -> bool:
        """Note a block; True when routing did not know that it is there."""
        rank.known[key] = known
        if key in rank.present:
            return False
        rank.present.add(key)
        holders = self._holders.get(known.block_hash, 0)
        self._holders[known.block_hash] = holders + 1
        return holders == 0

    def _release(self, ours: int) -> list[int]:
        holders = self._holders[ours] - 1
        if holders:
            self._holders[ours] = holders
            return []
        del self._holders[ours]
        return [ours]

    def _forget(self, rank: _Rank) -> list[KvEvent]:
        """Nothing of this rank is certain any more."""
        rank.known = {key: rank.known[key] for key in rank.present}
        gone = [ours for known in rank.known.values() for ours in self._release(known.block_hash)]
        rank.present = set()
        if not self._holders:
            return [BlocksCleared()]
        return [BlocksRemoved(gone)] if gone else []


def _unsigned(value: int | None) -> int | None:
    """Hashes are unsigned 64-bit; a binding that makes them signed means the same blocks."""
    return None if value is None else value & _UNSIGNED
