"""Block hashes agree across processes, inputs and ways of continuing a chain."""

import struct

import numpy as np
import pytest
from serving.block_hash import chain, root_hash
from xxhash import xxh3_64_intdigest

TOKENS = [token * 7919 % 150_000 for token in range(1000)]


def by_definition(tokens: list[int], block_size: int, parent: int) -> list[int]:
    hashes = []
    for start in range(0, len(tokens) - block_size + 1, block_size):
        block = struct.pack(f"<{block_size}I", *tokens[start : start + block_size])
        parent = xxh3_64_intdigest(block, seed=parent)
        hashes.append(parent)
    return hashes


@pytest.mark.parametrize("block_size", [1, 8, 16, 32, 128])
def test_chain_follows_its_written_definition(block_size: int) -> None:
    assert chain(TOKENS, block_size, 5) == by_definition(TOKENS, block_size, 5)


def test_hashes_never_change_between_releases() -> None:
    root = root_hash("model@revision")
    assert root == 0x954174C64EE0418E
    assert chain(list(range(8)), 4, root) == [0xF523090199A948B4, 0xAF7C478CBEDD867E]


@pytest.mark.parametrize("convert", [tuple, np.array, lambda t: np.array(t, dtype="<u4")])
def test_any_container_of_ids_gives_the_same_hashes(convert) -> None:
    assert chain(convert(TOKENS), 16, 5) == chain(TOKENS, 16, 5)


def test_only_full_blocks_have_a_hash() -> None:
    assert chain(TOKENS[:15], 16, 5) == []
    assert chain([], 16, 5) == []
    assert len(chain(TOKENS[:33], 16, 5)) == 2


def test_a_chain_can_be_continued_from_any_block() -> None:
    whole = chain(TOKENS, 16, 5)
    assert chain(TOKENS[160:], 16, whole[9]) == whole[10:]


def test_a_block_hash_names_the_whole_prefix() -> None:
    changed = [TOKENS[0] + 1, *TOKENS[1:]]
    assert set(chain(TOKENS, 16, 5)).isdisjoint(chain(changed, 16, 5))


def test_models_with_another_salt_share_no_hash() -> None:
    here, there = (chain(TOKENS, 16, root_hash(salt)) for salt in ("a", "b"))
    assert set(here).isdisjoint(there)


@pytest.mark.parametrize("token", [-1, 2**32])
def test_an_id_outside_u32_is_an_error(token: int) -> None:
    with pytest.raises(OverflowError):
        chain([token] * 16, 16, 5)
