"""Answers of the running service for `status`: from the frontend, or on a node from etcd."""

from __future__ import annotations

import asyncio
import http.client
import json
import re
from typing import Any

from msgspec import Struct

from serving.config import FrontendConfig
from serving.config.process import ControlServices
from serving.deploy.security.api_access import authorization_headers, client_tls
from serving.errors import OperatorError
from serving.protocol import InstanceInfo

ANSWER_S = 2.0
_SAMPLE = re.compile(r'^(serving_\w+)\{.*?instance="([^"]+)".*?\} (\S+)$', re.MULTILINE)


class ServiceAnswers(Struct, frozen=True, kw_only=True):
    """The body of `/ready`, and the share of prefix hits per instance (0 to 1)."""

    ready: dict[str, Any] = {}
    hit_rates: dict[str, float] = {}


def ask_frontend(address: str, listen: FrontendConfig) -> ServiceAnswers:
    """Empty when nothing answers at `address`, or another program does."""
    try:
        ready = json.loads(_get(address, "/ready", listen))
        metrics = _get(address, "/metrics", listen).decode(errors="replace")
    except (OSError, http.client.HTTPException, ValueError):
        return ServiceAnswers()
    return ServiceAnswers(
        ready=ready if isinstance(ready, dict) else {},
        hit_rates=hit_rates(metrics),
    )


def _get(address: str, path: str, listen: FrontendConfig) -> bytes:
    connection: http.client.HTTPConnection
    if (tls := client_tls(listen)) is not None:
        connection = http.client.HTTPSConnection(address, timeout=ANSWER_S, context=tls)
    else:
        connection = http.client.HTTPConnection(address, timeout=ANSWER_S)
    try:
        connection.request("GET", path, headers=authorization_headers(listen))
        return connection.getresponse().read()
    finally:
        connection.close()


def ask_etcd(control: ControlServices) -> ServiceAnswers:
    """The registered instances, for a node that has no frontend."""
    from serving.discovery import Discovery  # slow to load, and rarely needed

    async def fetch() -> list[InstanceInfo]:
        async with Discovery.from_settings(control) as discovery:
            return await discovery.instances(ANSWER_S)

    try:
        instances = asyncio.run(fetch())
    except OperatorError as exc:
        return ServiceAnswers(ready={"reason": exc.what})
    rows = [
        {"instance_id": i.instance_id, "role": i.role, "num_blocks": i.num_blocks, "host": i.host}
        for i in instances
    ]
    return ServiceAnswers(ready={"ready": True, "joined": True, "instances": rows})


def hit_rates(metrics: str) -> dict[str, float]:
    """Share of routed prompt tokens that the chosen instance had cached, per instance."""
    values: dict[tuple[str, str], float] = {}
    for name, instance, value in _SAMPLE.findall(metrics):
        # A frontend of several processes has one sample for each process.
        values[name, instance] = values.get((name, instance), 0.0) + float(value)
    routed = {
        instance: tokens
        for (name, instance), tokens in values.items()
        if name == "serving_routed_prompt_tokens_total" and tokens
    }
    hits = "serving_prefix_hit_tokens_total"
    return {instance: values.get((hits, instance), 0.0) / t for instance, t in routed.items()}
