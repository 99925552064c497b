"""The process that holds the blocks. It answers requests, which are lines of JSON."""

from __future__ import annotations

import argparse
import asyncio
import base64
import json
import sys
import traceback
from typing import Any

from benchmarks.kv_cuda.ends import End, Source, nixl_agent, region, set_plan, write_row


async def serve(options: argparse.Namespace) -> None:
    """Answers requests, lines of JSON."""
    end = End(options, seed=1)
    end.fill()
    open_transfers: dict[str, Any] = {}
    agent: Any = None
    write_row({"ready": True})
    while line := await asyncio.to_thread(sys.stdin.readline):
        request = json.loads(line)
        try:
            match request:
                case {"open": name, "as": key, **plan}:
                    if "depth" in plan:
                        set_plan(plan["chunk_mib"], plan["depth"])
                    open_transfers[key] = end.transfer(name, in_place="in_place" in plan)
                    await open_transfers[key].serve(Source(end))
                    write_row({"address": open_transfers[key].address})
                case {"close": key}:
                    await open_transfers.pop(key).close()
                    write_row({})
                case {"spans": _}:
                    write_row({"spans": end.spans})
                    end.spans.clear()
                case {"nixl": _}:
                    agent = nixl_agent("source")
                    kind, whole = region(end.flat())
                    agent.register_memory([(*whole, "")], kind)
                    described = base64.b64encode(agent.get_agent_metadata()).decode()
                    write_row({"agent": described, "address": whole[0], "order": end.order})
        except Exception:
            write_row({"error": traceback.format_exc()})
    for opened in open_transfers.values():
        await opened.close()
