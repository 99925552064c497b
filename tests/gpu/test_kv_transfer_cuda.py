"""KV from one GPU to another: copies alone, and engine to engine over UCX with the same tokens.

The prefill engine runs in a process of its own (this file, started as a script) that has the
second GPU as its device 0, as workers of a deployment do.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

TESTS = Path(__file__).parents[1]
if __name__ == "__main__":
    sys.path[:0] = [str(TESTS), str(TESTS.parent / "scripts")]

import msgspec  # noqa: E402
from kv_ends import line_of, process, pulling, serving  # noqa: E402
from serving.engine.torch.kv.pool import KvPool  # noqa: E402
from serving.kv_layout import BlocksInPlace, KvLayout  # noqa: E402
from serving.kv_transfer import PrefillProgress  # noqa: E402
from serving.protocol import KvTransferParams  # noqa: E402
from unit.engine.torch_rig import (  # noqa: E402
    generate,
    greedy,
    random_prompts,
    request,
    running,
    save_model,
)

pytestmark = pytest.mark.gpu
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
needs_two = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA GPUs")

NUM_TOKENS = 12
LENGTHS = [90, 33, 120, 64, 17, 101]
LAYOUT = KvLayout.uniform(num_layers=2, num_kv_heads=2, head_dim=16, block_size=8, dtype="float32")


# --- the prefill worker's process -----------------------------------------------------------------


class Exports:
    """A BlockSource over the engine's held blocks; every nonce is `n-<request>`."""

    def __init__(self, kv: Any) -> None:
        self._kv = kv

    def open(self, request_id: str, nonce: str) -> int:
        if not (held := self._kv.exported(request_id)):
            raise KeyError(request_id)
        return int(held)

    async def progress(self, request_id: str, nonce: str, beyond: int) -> PrefillProgress:
        return PrefillProgress(self.open(request_id, nonce), 0)

    def read(self, request_id: str, first: int, out: Any) -> None:
        self._kv.read(request_id, first, out)

    @property
    def memory(self) -> Any:
        return self._kv.memory

    def lend(self, request_id: str, first: int, count: int) -> Any:
        return self._kv.lend(request_id, first, count)

    def done(self, request_id: str) -> None:
        self._kv.release(request_id)


async def prefill(model: str, device: str, lengths: list[int]) -> None:
    """Computes the prompts, prints how to fetch each, and serves until its input closes."""
    async with running(Path(model), device=device, max_num_batched_tokens=48) as (engine, sink):
        layout = engine.spec.kv_layout
        assert layout is not None
        exports = Exports(engine.kv)
        chunk_bytes = 3 * layout.block_bytes
        async with serving("ucx", exports, layout, chunk_bytes=chunk_bytes, device=device) as end:
            for index, prompt in enumerate(random_prompts(lengths)):
                name = f"r{index}"
                engine.submit(request(name, prompt, greedy(NUM_TOKENS), phase="prefill"))
                await sink.finished(name)
                held = KvTransferParams(
                    source_instance="prefill-0",
                    source_epoch=1,
                    address=end.address,
                    request_id=name,
                    nonce=f"n-{name}",
                    num_tokens=len(prompt),
                    num_blocks=engine.kv.exported(name),
                    layout=layout.fingerprint,
                )
                message = {"params": msgspec.to_builtins(held), "tokens": sink.tokens[name]}
                print(json.dumps(message), flush=True)
            await asyncio.to_thread(sys.stdin.read)
            for index in range(len(lengths)):
                engine.kv.release(f"r{index}")


@contextmanager
def prefilled(model: Path, device: str) -> Iterator[Any]:
    """That process, on the second GPU."""
    arguments = [str(model), device, json.dumps(LENGTHS)]
    visible = (os.environ.get("CUDA_VISIBLE_DEVICES") or "0,1").split(",")
    order = ",".join([*visible[1:2], *visible[:1]])
    path = os.pathsep.join(filter(None, [str(TESTS), os.environ.get("PYTHONPATH", "")]))
    with process(*arguments, file=__file__, CUDA_VISIBLE_DEVICES=order, PYTHONPATH=path) as child:
        yield child


# --- the decode worker ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("tiny") / "llama")


async def check_hand_over(model: Path, device: str, route: str, *, in_place: bool) -> None:
    """All prompts at once; the answers are those of one engine that does it all."""
    prompts = random_prompts(LENGTHS)
    expected = [generate(model, prompt, NUM_TOKENS) for prompt in prompts]
    got: dict[int, list[int]] = {}
    with prefilled(model, device) as child:
        async with running(model, device=device, max_model_len=160) as (engine, sink):
            layout = engine.spec.kv_layout
            assert layout is not None
            chunk_bytes = 3 * layout.block_bytes
            options = {"chunk_bytes": chunk_bytes, "device": device, "in_place": in_place}
            async with pulling("ucx", layout, **options) as end:

                async def one(index: int, message: dict[str, Any]) -> None:
                    held = msgspec.convert(message["params"], KvTransferParams)
                    decode = request(
                        held.request_id,
                        [*prompts[index], *message["tokens"]],
                        greedy(NUM_TOKENS),
                        num_prompt_tokens=len(prompts[index]),
                        phase="decode",
                        kv_transfer_params=held,
                    )
                    async with engine.kv.reserve(decode) as reservation:
                        await end.pull(
                            held, reservation.first_block, reservation.num_blocks, reservation.write
                        )
                        reservation.commit()
                    await sink.finished(held.request_id)
                    got[index] = [*message["tokens"], *sink.tokens[held.request_id]]

                async with asyncio.TaskGroup() as tasks:
                    for index in range(len(prompts)):
                        message = json.loads(await line_of(child, 120))
                        tasks.create_task(one(index, message))
                assert end.route == route
    assert [got[index] for index in range(len(prompts))] == expected


@needs_two
@pytest.mark.parametrize(
    ("in_place", "route"), [(True, "cuda_ipc, in place"), (False, "cuda_ipc")], ids=str
)
async def test_tokens_continue_on_another_gpu_over_cuda_ipc(
    model: Path, in_place: bool, route: str
) -> None:
    await check_hand_over(model, "cuda", route, in_place=in_place)


@needs_gpu
def test_gather_reads_the_requested_blocks_and_scatter_writes_them_elsewhere() -> None:
    pool, other = (KvPool(LAYOUT, 40, "cuda") for _ in range(2))
    pool.tensor[1:].normal_()
    blocks, places = [7, 3, 40, 12, 1], [2, 9, 1, 33, 5]
    for memory in ("cuda", "cpu"):
        other.tensor.zero_()
        torch.cuda.synchronize()
        staged = torch.empty(len(blocks) * LAYOUT.block_bytes, dtype=torch.uint8, device=memory)
        pool.gather(blocks, staged)
        other.scatter(places, staged)
        torch.cuda.synchronize()
        assert torch.equal(other.tensor[places], pool.tensor[blocks])
        rest = [block for block in range(41) if block not in places]
        assert not other.tensor[rest].any()


@needs_gpu
@pytest.mark.parametrize("head_dim", [16, 1, 1024], ids=["odd", "tiny", "large"])
def test_blocks_are_fetched_from_another_pool(head_dim: int) -> None:
    """Sizes below, between and above what a program copies at a time."""
    layout = KvLayout.uniform(
        num_layers=3, num_kv_heads=3, head_dim=head_dim, block_size=8, dtype="float32"
    )
    pool, other = (KvPool(layout, 40, "cuda") for _ in range(2))
    pool.tensor[1:].normal_()
    blocks, places = [7, 3, 40, 12, 1], [2, 9, 1, 33, 5]
    torch.cuda.synchronize()
    assert pool.memory is not None
    num_bytes = len(blocks) * layout.block_bytes
    ids = np.array(blocks, np.int32)
    other.scatter(places, BlocksInPlace(pool.memory.address, ids, num_bytes, pool))
    assert torch.equal(other.tensor[places], pool.tensor[blocks])
    rest = [block for block in range(41) if block not in places]
    assert not other.tensor[rest].any()


@needs_gpu
def test_copies_run_beside_a_long_step() -> None:
    pool = KvPool(LAYOUT, 8, "cuda")
    staged = torch.empty(LAYOUT.block_bytes, dtype=torch.uint8, device="cuda")
    torch.cuda.synchronize()
    torch.cuda._sleep(2_000_000_000)  # about a second of GPU cycles on the engine's stream
    pool.tensor[3].fill_(7)
    written = pool.mark_step()
    pool.gather([2], staged)
    pool.scatter([4], staged)
    assert not written.query(), "a copy waited for the engine's stream"
    written.synchronize()
    pool.gather([3], staged)
    assert (staged.view(torch.float32) == 7).all()


if __name__ == "__main__":
    asyncio.run(prefill(sys.argv[1], sys.argv[2], json.loads(sys.argv[3])))
