"""Over a real socket: disconnects, slow clients, limits, and the official client."""

from __future__ import annotations

import asyncio
import gc
import json
import socket
from collections.abc import AsyncIterator
from typing import Any

import httpx
import openai
import pytest
from serving.errors import Overloaded
from serving.frontend.metrics.registry import Metrics
from starlette.applications import Starlette
from unit.frontend.fakes import MODEL, FakePipeline
from waiting import until

DEADLINE_S = 5.0
CHAT: dict[str, Any] = {"model": MODEL, "messages": [{"role": "user", "content": "hello"}]}


async def connect(url: str) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    connection = socket.socket()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 16 * 1024)
    connection.setblocking(False)
    port = int(url.rsplit(":", 1)[1])
    await asyncio.get_running_loop().sock_connect(connection, ("127.0.0.1", port))
    return await asyncio.open_connection(sock=connection)


async def start_request(
    url: str, body: dict[str, Any]
) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    reader, writer = await connect(url)
    content = json.dumps(body).encode()
    writer.write(
        b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n%b"
        % (len(content), content)
    )
    await writer.drain()
    return reader, writer


@pytest.fixture
async def openai_client(url: str) -> AsyncIterator[openai.AsyncOpenAI]:
    async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="x", max_retries=0) as client:
        yield client


@pytest.mark.parametrize("stream", [False, True])
async def test_disconnect_aborts_the_work(url: str, pipeline: FakePipeline, stream: bool) -> None:
    pipeline.endless, pipeline.delay_s = True, 0.002
    _, writer = await start_request(url, {**CHAT, "stream": stream, "n": 2})
    await until(lambda: pipeline.num_steps > 10)
    writer.close()
    await until(lambda: pipeline.active == 0)
    assert len(pipeline.aborted) == 2
    async with httpx.AsyncClient() as client:
        page = (await client.get(f"{url}/metrics")).text
    assert (
        'serving_requests_total{endpoint="chat.completions",finish_reason="cancelled",'
        'status="499"} 1.0'
    ) in page
    assert "serving_requests_in_flight 0.0" in page


async def test_disconnect_before_the_first_token_aborts_the_work(
    url: str, pipeline: FakePipeline
) -> None:
    pipeline.delay_s = 60.0
    _, writer = await start_request(url, {**CHAT, "stream": True})
    await until(lambda: pipeline.active == 1)
    writer.close()
    await until(lambda: pipeline.active == 0)
    assert len(pipeline.aborted) == 1


async def test_disconnect_in_the_middle_of_the_body_reaches_no_worker(
    url: str, pipeline: FakePipeline, metrics: Metrics
) -> None:
    _, writer = await connect(url)
    writer.write(b'POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 500\r\n\r\n{"a')
    await writer.drain()
    assert metrics.in_flight.value == 0  # it takes nobody's place
    writer.close()
    async with httpx.AsyncClient() as client:
        async with asyncio.timeout(DEADLINE_S):
            while 'status="499"' not in (await client.get(f"{url}/metrics")).text:
                pass
    assert not pipeline.seen


async def test_slow_bodies_take_nobodys_place(url: str) -> None:
    """As many of them as requests may be in flight, and more."""
    head = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 500\r\n\r\n{"
    slow = [await connect(url) for _ in range(12)]
    for _, writer in slow:
        writer.write(head)
        await writer.drain()
    async with httpx.AsyncClient() as client:
        answer = await client.post(f"{url}/v1/chat/completions", json=CHAT)
    assert answer.status_code == 200
    for _, writer in slow:
        writer.close()


async def test_slow_client_gets_fewer_chunks_and_slows_no_worker(
    url: str, pipeline: FakePipeline
) -> None:
    assert pipeline.card is not None
    tokens = 30_000
    pipeline.card = type(pipeline.card)(
        **{f: getattr(pipeline.card, f) for f in pipeline.card.__struct_fields__}
        | {"max_model_len": 2 * tokens}
    )
    pipeline.token_ids = [pipeline.token_ids[0]] * tokens
    reader, writer = await start_request(url, {**CHAT, "stream": True})
    writer.transport.pause_reading()  # type: ignore[attr-defined]
    await until(lambda: pipeline.active == 0 and bool(pipeline.seen))
    assert not pipeline.aborted
    writer.transport.resume_reading()  # type: ignore[attr-defined]
    received = b""
    async with asyncio.timeout(DEADLINE_S):
        while b"[DONE]" not in received[-64:]:
            received += await reader.read(1 << 20)
    writer.close()
    contents = [
        json.loads(line[6:])["choices"][0]["delta"].get("content", "")
        for line in received.split(b"\n")
        if line.startswith(b"data: {")
    ]
    assert len("".join(contents)) == tokens * len(pipeline.tokenizer.decode(pipeline.token_ids[:1]))
    assert len(contents) < tokens / 10


async def test_client_that_stops_reading_is_disconnected(
    impatient_url: str, pipeline: FakePipeline
) -> None:
    pipeline.endless = True
    pipeline.token_ids = pipeline.tokenizer.encode("hello " * 50).ids
    pipeline.per_step = 50
    _, writer = await start_request(impatient_url, {**CHAT, "stream": True})
    writer.transport.pause_reading()  # type: ignore[attr-defined]
    await until(lambda: len(pipeline.aborted) == 1)
    writer.transport.abort()


@pytest.mark.parametrize("chunked", [False, True])
async def test_ten_megabytes_are_refused_and_the_connection_survives(
    url: str, pipeline: FakePipeline, chunked: bool
) -> None:
    async def chunks() -> AsyncIterator[bytes]:
        for _ in range(160):
            yield b"x" * 65536

    content: Any = chunks() if chunked else b"x" * 10 * 1024 * 1024
    async with httpx.AsyncClient(limits=httpx.Limits(max_connections=1)) as client:
        response = await client.post(f"{url}/v1/completions", content=content)
        assert response.status_code == 413
        assert response.json()["error"]["code"] == "request_too_large"
        assert (await client.get(f"{url}/health")).status_code == 200
    assert not pipeline.seen


async def test_client_too_slow_with_its_body_gets_408(
    impatient_url: str,
) -> None:
    reader, writer = await connect(impatient_url)
    writer.write(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 500\r\n\r\n{")
    async with asyncio.timeout(DEADLINE_S):
        assert b" 408 " in await reader.readline()
    writer.close()


@pytest.mark.parametrize(
    "garbage", [b"\x00" * 100, b"GET\r\n\r\n", b"\x16\x03\x01\x02\x00\x01\x00", b"A" * 100_000]
)
async def test_garbage_on_the_socket_leaves_the_server_standing(url: str, garbage: bytes) -> None:
    reader, writer = await connect(url)
    writer.write(garbage + b"\r\n\r\n")
    async with asyncio.timeout(DEADLINE_S):
        await reader.read(100)
    writer.close()
    async with httpx.AsyncClient() as client:
        assert (await client.get(f"{url}/health")).status_code == 200


async def test_more_than_max_inflight_is_429_with_retry_after(
    url: str, pipeline: FakePipeline
) -> None:
    pipeline.endless, pipeline.delay_s = True, 0.005
    writers = [(await start_request(url, {**CHAT, "n": 4}))[1] for _ in range(2)]
    await until(lambda: pipeline.active == 8)
    async with httpx.AsyncClient() as client:
        response = await client.post(f"{url}/v1/chat/completions", json=CHAT)
        assert response.status_code == 429
        assert response.headers["retry-after"] == "1"
        assert response.json()["error"]["type"] == "rate_limit_error"
        assert (await client.get(f"{url}/health")).status_code == 200
        for writer in writers:
            writer.close()
        await until(lambda: pipeline.active == 0)
        pipeline.endless = False
        response = await client.post(f"{url}/v1/chat/completions", json=CHAT)
        assert response.status_code == 200


async def test_many_streams_at_once_get_their_own_text(
    url: str, app: Starlette, openai_client: openai.AsyncOpenAI, pipeline: FakePipeline
) -> None:
    async def one() -> str:
        stream = await openai_client.chat.completions.create(**CHAT, stream=True)
        return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])

    texts = await asyncio.gather(*(one() for _ in range(8)))
    assert set(texts) == {"hello world, the fox"}
    assert pipeline.active == 0


async def test_official_client_chats(openai_client: openai.AsyncOpenAI) -> None:
    answer = await openai_client.chat.completions.create(
        **CHAT, logprobs=True, top_logprobs=1, temperature=0
    )
    assert answer.choices[0].message.content == "hello world, the fox"
    assert answer.choices[0].logprobs is not None
    assert answer.usage is not None
    assert answer.usage.prompt_tokens_details is not None
    assert answer.usage.prompt_tokens_details.cached_tokens == 3


async def test_official_client_streams_chat_with_usage(openai_client: openai.AsyncOpenAI) -> None:
    stream = await openai_client.chat.completions.create(
        **CHAT, stream=True, stream_options={"include_usage": True}
    )
    chunks = [chunk async for chunk in stream]
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert text == "hello world, the fox"
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.total_tokens > 0


async def test_official_client_completes(openai_client: openai.AsyncOpenAI) -> None:
    answer = await openai_client.completions.create(
        model=MODEL, prompt=["a"], max_tokens=64, logprobs=1
    )
    assert answer.choices[0].text == "hello world, the fox"
    stream = await openai_client.completions.create(
        model=MODEL, prompt="a", max_tokens=64, stream=True
    )
    assert "".join([c.choices[0].text async for c in stream]) == "hello world, the fox"
    assert [model.id async for model in openai_client.models.list()] == [MODEL]
    assert (await openai_client.models.retrieve(MODEL)).id == MODEL


async def test_official_client_raises_its_own_errors(
    openai_client: openai.AsyncOpenAI, pipeline: FakePipeline
) -> None:
    with pytest.raises(openai.NotFoundError):
        await openai_client.chat.completions.create(**{**CHAT, "model": "other"})
    with pytest.raises(openai.BadRequestError) as bad:
        await openai_client.chat.completions.create(**CHAT, temperature=3)
    assert bad.value.param == "temperature"
    pipeline.fail_after, pipeline.error = 0, Overloaded("full")
    with pytest.raises(openai.InternalServerError):
        await openai_client.chat.completions.create(**CHAT)
    pipeline.fail_after = 2
    stream = await openai_client.chat.completions.create(**CHAT, stream=True)
    with pytest.raises(openai.APIError, match="full"):
        async for _ in stream:
            pass


@pytest.mark.parametrize("stream", [False, True])
async def test_requests_leave_nothing_to_the_garbage_collector(url: str, stream: bool) -> None:
    """Objects in cycles wait for a collection, which then stalls every stream."""
    loop = asyncio.get_running_loop()
    content = json.dumps({**CHAT, "stream": stream}).encode()
    request = b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n%b"
    with socket.socket() as client:
        client.setblocking(False)
        await loop.sock_connect(client, ("127.0.0.1", int(url.rsplit(":", 1)[1])))

        async def ask() -> None:
            await loop.sock_sendall(client, request % (len(content), content))
            answer = b""
            while not answer.endswith(b"\r\n0\r\n\r\n" if stream else b"}}}"):
                answer += await loop.sock_recv(client, 65536)

        await ask()
        gc.collect()
        gc.disable()
        try:
            async with asyncio.timeout(DEADLINE_S):
                for _ in range(20):
                    await ask()
                await asyncio.sleep(0.01)
            garbage = gc.collect()
        finally:
            gc.enable()
    assert garbage < 20, f"{garbage} objects after 20 requests"
