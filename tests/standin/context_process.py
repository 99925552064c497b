"""Test code. A context in a process of its own: prefills what it is told, then holds the KV.

    python -P context_process.py MODEL BACKEND

One JSON list of token ids per line on standard input; for each a line with the handover, whose
bytes are in base64, and how many blocks are in use. An empty list only asks for the blocks.
"""

from __future__ import annotations

import asyncio
import base64
import dataclasses
import json
import sys
from typing import Any


async def main() -> None:
    from tensorrt_llm import LLM, SamplingParams
    from tensorrt_llm.llmapi import CacheTransceiverConfig, DisaggregatedParams, KvCacheConfig

    llm = LLM(
        model=sys.argv[1],
        dtype="float32",
        max_seq_len=256,
        max_num_tokens=256,
        skip_tokenizer_init=True,
        kv_cache_config=KvCacheConfig(max_tokens=2048, tokens_per_block=8),
        cache_transceiver_config=CacheTransceiverConfig(
            backend=sys.argv[2], kv_transfer_timeout_ms=60_000
        ),
    )
    print("ready", flush=True)
    while line := await asyncio.to_thread(sys.stdin.readline):
        plain: dict[str, Any] = {}
        if prompt := json.loads(line):
            result = await llm.generate_async(
                inputs=prompt,
                sampling_params=SamplingParams(end_id=-1),
                disaggregated_params=DisaggregatedParams(request_type="context_only"),
            )
            plain = dataclasses.asdict(result.outputs[0].disaggregated_params)
            plain["opaque_state"] = base64.b64encode(plain["opaque_state"]).decode()
        plain["active_blocks"] = llm._executor.load().active_blocks
        print(json.dumps(plain), flush=True)
    llm.shutdown()


if __name__ == "__main__":
    asyncio.run(main())
