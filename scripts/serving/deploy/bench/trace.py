"""A recorded workload, cut to what the served model can take."""

from __future__ import annotations

import json
from pathlib import Path

from serving.config import BenchConfig
from serving.errors import OperatorError

_TEMPLATE_TOKENS = 64
"""Room for the tokens that a chat template adds to a prompt."""


def cut_trace(config: BenchConfig, max_model_len: int, out: Path) -> tuple[int, int]:
    """Write the requests to replay to `out`: the first `max_requests` that fit into the context.

    Their times are divided by `speed_up`. Returns how many were written, and how many were left
    out because they are too long. Raises OperatorError for a trace that cannot be replayed.
    """
    assert config.trace is not None
    taken, too_long = 0, 0
    try:
        with Path(config.trace).open(encoding="utf-8") as lines, out.open("w") as kept:
            for line in lines:
                if not line.strip():
                    continue
                request = json.loads(line)
                length = request["input_length"] + request["output_length"]
                if length + _TEMPLATE_TOKENS > max_model_len:
                    too_long += 1
                    continue
                request["timestamp"] = request["timestamp"] / config.speed_up
                kept.write(json.dumps(request) + "\n")
                taken += 1
                if taken == config.max_requests:
                    break
    except FileNotFoundError:
        raise OperatorError(
            f"{config.trace} does not exist", remedy="set `bench.trace` to an existing trace"
        ) from None
    except (ValueError, KeyError, TypeError) as exc:
        raise OperatorError(
            f"{config.trace} is not a trace in the format of Mooncake: {exc!r}",
            remedy='a line is {"timestamp": ms, "input_length": n, "output_length": n, "hash_ids": [...]}',
        ) from None
    if not taken:
        raise OperatorError(
            f"no request of {config.trace} fits into {max_model_len} tokens",
            remedy="raise `engine.max_model_len`, or use another `bench.trace`",
        )
    return taken, too_long
