"""The mock engine takes the time of its speed, on a virtual clock."""

import asyncio
from pathlib import Path

import pytest
from serving.config import MockConfig
from serving.protocol import KvTransferParams
from unit.engine.mock_rig import LAYOUT, Rig, on_virtual_time, prompt


def test_engine_takes_the_time_of_its_steps(tmp_path: Path) -> None:
    """100 tokens in chunks of 32, then four more tokens: each time is exact."""
    timing = MockConfig(prefill_tokens_per_s=1000, step_s=0.01, step_sequence_s=0.001)

    async def main() -> None:
        async with Rig(tmp_path, timing, max_num_batched_tokens=32) as rig:
            rig.submit("r", prompt(100), 5)
            await rig.end_of("r")
            assert rig.began["r"] == pytest.approx(4 * 0.01 + 0.1)
            assert rig.ended["r"] == pytest.approx(rig.began["r"] + 4 * 0.011)
            rig.submit("again", prompt(100), 1)
            start = rig.ended["r"]
            await rig.end_of("again")
            assert rig.last("again").cached_tokens == 96
            assert rig.ended["again"] - start == pytest.approx(0.01 + 4 / 1000)

    on_virtual_time(main())


def test_late_timers_do_not_add_up(tmp_path: Path) -> None:
    """A loop whose timers are each 1 ms late still makes 1000 steps of 1 ms in about 1 s."""

    class Late:
        def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
            self._call_at = loop.call_at

        def __call__(self, when, action, *more):  # type: ignore[no-untyped-def]
            return self._call_at(when + 0.001, action, *more)

    async def main() -> None:
        loop = asyncio.get_running_loop()
        timing = MockConfig(prefill_tokens_per_s=0, step_s=0.001, step_sequence_s=0)
        async with Rig(tmp_path, timing, max_model_len=2048) as rig:
            loop.call_at = Late(loop)  # type: ignore[method-assign]
            rig.submit("r", prompt(4), 1000)
            await rig.end_of("r")
            assert rig.ended["r"] == pytest.approx(1.0, abs=0.003)

    on_virtual_time(main())


def test_prefill_holds_and_decode_waits_for_the_transfer(tmp_path: Path) -> None:
    """Two prompts of 64 tokens: their transfers follow each other over the decoder's one link."""
    num_bytes = 8 * LAYOUT.block_bytes
    timing = MockConfig(
        prefill_tokens_per_s=0, step_s=0.01, step_sequence_s=0, transfer_bytes_per_s=num_bytes
    )

    async def main() -> None:
        loop = asyncio.get_running_loop()
        async with (
            Rig(tmp_path, timing, role="prefill") as source,
            Rig(tmp_path, timing, role="decode") as target,
        ):
            for name, first in (("a", 1), ("b", 2)):
                source.submit(name, prompt(64, first), 4, phase="prefill")
            await source.end_of("a", "b")
            assert loop.time() == pytest.approx(0.01)
            assert source.engine.load().active_blocks == 16
            for name, first in (("a", 1), ("b", 2)):
                params = source.last(name).kv_transfer_params
                assert isinstance(params, KvTransferParams)
                tokens = prompt(64, first) + source.tokens(name)
                more = {"phase": "decode", "kv_transfer_params": params, "num_prompt": 64}
                target.submit(name, tokens, 4, **more)
            await target.end_of("a", "b")
            assert target.began["a"] == pytest.approx(0.01 + 1 + 0.01)
            assert target.began["b"] == pytest.approx(0.01 + 2 + 0.01)
            assert target.last("b").finish_reason == "length"
            assert target.outputs["a"][0].cached_tokens == 64
            stats = target.engine.transfers
            assert (stats.kv_transfers, stats.kv_bytes_received) == (2, 2 * num_bytes)
            assert stats.kv_transfer_failures == stats.local_prefill_fallbacks == 0
            assert source.engine.load().active_blocks == 0
            assert source.engine.load().cached_blocks == 16

    on_virtual_time(main())
