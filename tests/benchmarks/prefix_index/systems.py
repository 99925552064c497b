"""The two indexes that are compared, behind one interface. Each is imported where it is made."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.prefix_index.workload import BLOCK_TOKENS, Event

ROOT = Path(__file__).resolve().parents[3]


class Ours:
    def __init__(self) -> None:
        sys.path.insert(0, str(ROOT / "scripts"))
        import msgspec
        from serving import block_hash
        from serving.kv_router.prefix_index import PrefixIndex
        from serving.protocol import BlocksRemoved, BlocksStored, KvEventBatch, msgpack_encode

        self._index, self._chain = PrefixIndex(), block_hash.chain
        self._batch, self._stored, self._encode = KvEventBatch, BlocksStored, msgpack_encode
        self._removed, self._decode = BlocksRemoved, msgspec.msgpack.Decoder(KvEventBatch).decode
        self.find = self._find()

    def encoded(self, event: Event) -> bytes:
        worker, parent, hashes = event
        return self._encode(self._batch(f"w{worker}", 1, 1, [self._stored(parent, hashes)]))

    def encoded_removal(self, worker: int, hashes: list[int]) -> bytes:
        return self._encode(self._batch(f"w{worker}", 1, 1, [self._removed(hashes)]))

    def apply(self, raw: bytes) -> None:
        batch = self._decode(raw)
        for event in batch.events:
            if isinstance(event, self._stored):
                self._index.store(
                    batch.instance_id, event.block_hashes, event.parent_hash, event.tier
                )
            else:
                self._index.remove(batch.instance_id, event.block_hashes, event.tier)

    def _find(self) -> Callable[[list[int]], Any]:
        return self._index.overlap

    def found(self, hashes: list[int]) -> dict[int, int]:
        return {int(name[1:]): n for name, n in self._index.overlap(hashes).blocks.items()}

    def remove_worker(self, worker: int) -> None:
        self._index.remove_instance(f"w{worker}")

    def hash(self, tokens: Any) -> Any:
        return self._chain(tokens, BLOCK_TOKENS, 5)


class Dynamo:
    def __init__(self) -> None:
        from dynamo._core import RadixTree, compute_block_hash_for_seq

        self._tree, self._hash, self._number = RadixTree(), compute_block_hash_for_seq, 0
        self.find = self._tree.find_matches

    def encoded(self, event: Event) -> tuple[int, bytes]:
        worker, parent, hashes = event
        blocks = [{"block_hash": each, "tokens_hash": each} for each in hashes]
        return worker, self._event({"stored": {"parent_hash": parent, "blocks": blocks}})

    def encoded_removal(self, worker: int, hashes: list[int]) -> tuple[int, bytes]:
        return worker, self._event({"removed": {"block_hashes": hashes}})

    def _event(self, data: dict[str, Any]) -> bytes:
        self._number += 1
        return json.dumps({"event_id": self._number, "data": data, "dp_rank": 0}).encode()

    def apply(self, raw: tuple[int, bytes]) -> None:
        self._tree.apply_event(*raw)

    def found(self, hashes: list[int]) -> dict[int, int]:
        scores = self._tree.find_matches(hashes).scores
        return {key[0] if isinstance(key, tuple) else key: n for key, n in scores.items()}

    def remove_worker(self, worker: int) -> None:
        self._tree.remove_worker(worker)

    def hash(self, tokens: Any) -> Any:
        return self._hash(tokens, BLOCK_TOKENS)
