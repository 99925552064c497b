"""How sequences use the block pool: they claim, grow, store and free their blocks.

Also knows which prompts are being computed right now, so that a request with the same prefix can
wait for them instead of computing it a second time.
"""

from __future__ import annotations

from serving.engine.core.block_pool import BlockPool
from serving.engine.core.sequence import Sequence


class SequenceBlocks:
    """The blocks of all sequences of one engine, `block_size` tokens each. Not thread-safe."""

    def __init__(self, pool: BlockPool, block_size: int) -> None:
        self.pool, self.block_size = pool, block_size
        self._computing: dict[int, Sequence] = {}  # block hash -> the sequence that computes it

    def num_blocks(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_size)

    def num_uncached(self, sequence: Sequence) -> int:
        """Tokens that it will have to compute, as far as the cache can tell now."""
        num_tokens = len(sequence.tokens)
        if sequence.is_reservation:
            return 1
        if sequence.computes_whole_prompt:
            return num_tokens
        hashes = sequence.block_hashes((num_tokens - 1) // self.block_size)
        return num_tokens - self.pool.num_stored(hashes) * self.block_size

    def is_being_computed(self, sequence: Sequence) -> bool:
        """Whether a running request is about to store the next block that this one needs."""
        if not self._computing or sequence.is_reservation or sequence.computes_whole_prompt:
            return False
        hashes = sequence.block_hashes((len(sequence.tokens) - 1) // self.block_size)
        num_stored = self.pool.num_stored(hashes)
        return num_stored < len(hashes) and hashes[num_stored] in self._computing

    def claim(self, sequence: Sequence, num_tokens: int, num_spare: int) -> bool:
        """Give it blocks for `num_tokens`, the cached ones of its prefix among them.

        False, with nothing changed, unless the pool keeps `num_spare` blocks beside.
        """
        # A prompt found whole still needs one token computed, or there would be no logits; a
        # reservation brings that token along and needs the KV of the others only.
        hashes = sequence.block_hashes((len(sequence.tokens) - 1) // self.block_size)
        # Of a prompt that is to be computed whole, nothing counts as known.
        known = [] if sequence.computes_whole_prompt else hashes
        matched = self.pool.match(known)
        num_new = self.num_blocks(num_tokens) - len(matched)
        if not self.pool.fits(matched, num_new + num_spare):
            return False
        sequence.blocks, sequence.num_stored = self.pool.claim(matched, known, num_new)
        sequence.num_computed = sequence.num_stored * self.block_size
        sequence.num_scheduled = sequence.num_computed
        if sequence.num_cached is None:
            sequence.num_cached = sequence.num_computed
        if not sequence.is_reservation:
            for value in hashes[sequence.num_stored :]:
                self._computing.setdefault(value, sequence)
        return True

    def needs_another(self, sequence: Sequence) -> bool:
        """Whether its blocks have no room for its last token."""
        return self.num_blocks(len(sequence.tokens)) > len(sequence.blocks)

    def store_computed(self, sequence: Sequence) -> None:
        """Make its full computed blocks available for prefix hits."""
        first, last = sequence.num_stored, sequence.num_computed // self.block_size
        if first >= last:
            return
        hashes = sequence.block_hashes(last)
        parent = hashes[first - 1] if first else None
        own = sequence.blocks[first:last]
        are_read = sequence.in_flight > 0
        stored = self.pool.store(own, hashes[first:], parent, are_read=are_read)
        if stored != own:
            sequence.blocks[first:last] = stored
            sequence.num_tabled = min(sequence.num_tabled, first)
        sequence.num_stored = last
        self._forget(sequence, hashes[first:])

    def stop_computing(self, sequence: Sequence) -> None:
        """It will not store the rest of its prompt: others need not wait for it."""
        self._forget(sequence, sequence.hashes[sequence.num_stored :])

    def free(self, sequence: Sequence) -> None:
        """Its stored blocks stay in the cache until they are evicted."""
        blocks, sequence.blocks = sequence.blocks, []
        self.pool.release(blocks)

    def check_integrity(self, running: list[Sequence]) -> None:
        """For tests: only running sequences compute blocks."""
        ids = {id(sequence) for sequence in running}
        assert all(id(s) in ids for s in self._computing.values()), "stale computing entry"

    def _forget(self, sequence: Sequence, hashes: list[int]) -> None:
        for value in hashes:
            if self._computing.get(value) is sequence:
                del self._computing[value]
