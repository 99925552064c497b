"""The service that a benchmark measures."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import httpx
from msgspec import Struct

from serving.errors import OperatorError


class Target(Struct, frozen=True):
    """As `/ready` describes it. `tokenizer_dir` is the folder of the served model's tokenizer."""

    url: str
    model: str
    topology: str
    policy: str
    num_instances: int
    max_model_len: int
    tokenizer_dir: str


def find_target(url: str, headers: Mapping[str, str], tokenizer_dir: Path) -> Target:
    """Raises OperatorError when nothing serves at `url`, or the service cannot be measured."""
    if url.startswith("https:"):
        raise OperatorError(
            f"{url} uses HTTPS, and the load generator sends plain HTTP",
            remedy="serve without `frontend.tls` while you measure",
        )
    try:
        answer = httpx.get(f"{url}/ready", headers=dict(headers), timeout=5.0, trust_env=False)
        state = answer.json()
    except (httpx.HTTPError, ValueError) as exc:
        raise OperatorError(
            f"nothing serves at {url}: {exc}",
            remedy="start a service, for example `snakemake serve_agg_router`, then run this again",
        ) from None
    if not state.get("ready"):
        raise OperatorError(
            f"the service at {url} is not ready: {state.get('reason') or answer.text[:200]}",
            remedy="see `snakemake status`",
        )
    return Target(
        url=url,
        model=state["model"],
        topology=state["topology"],
        policy=state["policy"],
        num_instances=len(state["instances"]),
        max_model_len=state["max_model_len"],
        tokenizer_dir=str(tokenizer_dir.resolve()),
    )
