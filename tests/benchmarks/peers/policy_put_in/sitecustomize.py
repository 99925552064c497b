"""For live comparisons: a frontend that finds this on its path chooses as ROUTING_POLICY says."""

import os
import sys
from pathlib import Path

if "serving.frontend" in sys.orig_argv:
    sys.path.append(str(Path(__file__).parents[3]))

    from random import Random
    from typing import Any

    from benchmarks.peers.routing_policies import OTHERS, sglang_like
    from serving.kv_router import policy

    _name = os.environ["ROUTING_POLICY"]
    _select = OTHERS[_name](Random())
    if _name == "sglang-like":
        _select = sglang_like(Random(), int(os.environ["ROUTING_TREE_BLOCKS"]))

    def select(request: policy.RoutingRequest, **ours: Any) -> str:
        """In place of ours."""
        return _select(request)

    policy.select = select
    print(f"requests are routed as {_name} would", file=sys.stderr, flush=True)
