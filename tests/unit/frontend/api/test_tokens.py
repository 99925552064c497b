"""Endpoints for tokens, and the small ones about the service."""

from __future__ import annotations

import httpx
from unit.frontend.fakes import MODEL, FakePipeline

MESSAGES = [{"role": "user", "content": "hello"}]


async def test_text_is_tokenized_and_back(client: httpx.AsyncClient) -> None:
    answer = (
        await client.post("/tokenize", json={"prompt": "hello world", "return_token_strs": True})
    ).json()
    assert answer["count"] == len(answer["tokens"])
    assert answer["max_model_len"] == 256
    assert "".join(answer["token_strs"]) == "hello world"
    back = await client.post("/detokenize", json={"tokens": answer["tokens"], "model": MODEL})
    assert back.json() == {"prompt": "hello world"}


async def test_messages_are_tokenized_like_those_of_a_chat(
    client: httpx.AsyncClient, pipeline: FakePipeline
) -> None:
    answer = (await client.post("/tokenize", json={"messages": MESSAGES})).json()
    await client.post("/v1/chat/completions", json={"model": MODEL, "messages": MESSAGES})
    assert answer["tokens"] == pipeline.seen[0].token_ids


async def test_what_cannot_be_tokenized_is_refused(client: httpx.AsyncClient) -> None:
    assert (await client.post("/tokenize", json={})).status_code == 400
    assert (await client.post("/tokenize", json={"prompt": "x", "model": "y"})).status_code == 404
    assert (await client.post("/detokenize", json={"tokens": [10**6]})).status_code == 400


async def test_tokenizer_and_version_are_described(client: httpx.AsyncClient) -> None:
    info = (await client.get("/tokenizer_info")).json()
    assert info["eos_token"] == "<|im_end|>"
    assert "<|im_start|>" in info["chat_template"]
    assert (await client.get("/version")).json()["version"]
    assert (await client.get("/load")).json() == {"server_load": 0}
    assert (await client.get("/")).json()["model"] == MODEL
