"""The part of OpenAI's specification that this service has, as schemathesis reads it."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import yaml
from integration.deployment import REPO

SPECIFICATION = Path(
    os.environ.get("OPENAI_SPECIFICATION")
    or REPO.parent / "shared" / "specs" / "openai-openapi.yaml"
)
OPERATIONS = {
    "/chat/completions": ("post",),
    "/completions": ("post",),
    "/responses": ("post",),
    "/embeddings": ("post",),
    "/models": ("get",),
    "/models/{model}": ("get",),
}
REFERENCE = re.compile(r'"#/components/(\w+)/([^"]+)"')
MODEL_REQUESTS = (
    "CreateChatCompletionRequest",
    "CreateCompletionRequest",
    "CreateResponse",
    "CreateEmbeddingRequest",
)


def served_part(model: str) -> dict[str, Any]:
    """The operations that are served, with what they refer to.

    All is as OpenAI wrote it but for this:
    - Requests name `model`. A random name would make every answer a 404.
    - Events of a stream are read as version 3.2 writes them: the schema is that of their data.
    - Completions stream, which the text of the specification says and its table does not.
    - An embedding may be a string, which it is with `encoding_format: base64`.
    - With `echo`, the first token has no log-probability: null, as OpenAI's own service sends it.
    """
    whole = yaml.load(SPECIFICATION.read_text(), Loader=yaml.CSafeLoader)
    paths = {
        path: {method: whole["paths"][path][method] for method in methods}
        for path, methods in OPERATIONS.items()
    }
    for parameter in paths["/models/{model}"]["get"]["parameters"]:
        parameter["schema"] = {"type": "string", "enum": [model]}
    schemas = whole["components"]["schemas"]
    for name in MODEL_REQUESTS:
        schemas[name] = {
            "allOf": [
                schemas[name],
                {
                    "type": "object",
                    "properties": {"model": {"enum": [model]}},
                    "required": ["model"],
                },
            ]
        }
    for methods in paths.values():
        for operation in methods.values():
            operation.pop("security", None)
            _describe_stream(operation["responses"]["200"]["content"])
    paths["/completions"]["post"]["responses"]["200"]["content"]["text/event-stream"] = {}
    vector = schemas["Embedding"]["properties"]
    vector["embedding"] = {"anyOf": [vector["embedding"], {"type": "string"}]}
    choice = schemas["CreateCompletionResponse"]["properties"]["choices"]["items"]["properties"]
    _allow_null(choice["logprobs"], "token_logprobs")
    return {
        "openapi": whole["openapi"],
        "info": whole["info"],
        "paths": paths,
        "components": _reachable(paths, whole["components"]),
    }


def _describe_stream(content: dict[str, Any]) -> None:
    if (stream := content.get("text/event-stream")) is None:
        return
    event = {"contentMediaType": "application/json", "contentSchema": stream.pop("schema")}
    stream["itemSchema"] = {
        "type": "object",
        "properties": {"data": {"anyOf": [{"const": "[DONE]"}, event]}},
        "required": ["data"],
    }


def _allow_null(logprobs: dict[str, Any], name: str) -> None:
    for each in (logprobs, *logprobs.get("anyOf", ())):
        if (array := each.get("properties", {}).get(name)) is not None:
            array["items"] = {"anyOf": [array["items"], {"type": "null"}]}


def _reachable(paths: Any, components: dict[str, Any]) -> dict[str, Any]:
    """The components that `paths` refer to, and those that they refer to in turn."""
    found: dict[str, Any] = {}
    texts = [json.dumps(paths, default=str)]
    while texts:
        for kind, name in REFERENCE.findall(texts.pop()):
            of_kind = found.setdefault(kind, {})
            if name not in of_kind:
                of_kind[name] = components[kind][name]
                texts.append(json.dumps(of_kind[name], default=str))
    return found


def write_served_part(path: Path, model: str) -> None:
    path.write_text(json.dumps(served_part(model), default=str))
