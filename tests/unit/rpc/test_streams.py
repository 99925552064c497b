"""Streams of outputs over a real connection: order, ends, aborts, losses, refusals."""

import asyncio

import pytest
from serving.errors import (
    DeadlineExceeded,
    EngineFailed,
    InstanceLost,
    InvalidRequest,
    ModelNotFound,
    NoInstances,
    Overloaded,
    QueuedTooLong,
    ServingError,
)
from serving.framing import frame
from serving.protocol import (
    PROTOCOL_VERSION,
    Draining,
    EngineOutput,
    EngineRequest,
    ErrorInfo,
    Generate,
    Hello,
    SamplingParams,
    Step,
)
from serving.rpc import OutputStream, RpcClient, raise_error
from unit.rpc.rpc_rig import RpcRig, info_for, read_frame, request, token
from waiting import until


async def test_steps_that_wait_for_a_frontend_come_as_one_output(rig: RpcRig) -> None:
    client = await rig.client()
    client.merge = True
    async with client.generate(request("r")) as outputs:
        await until(lambda: rig.handler.requests)
        rig.server.send([EngineOutput("r", [1], cached_tokens=4)])
        rig.server.send([EngineOutput("r", [2, 3])])
        rig.server.send([EngineOutput("r", [4], "length", stop_token_id=9)])
        await rig.round_trip(client)  # all of it is here
        found = [output async for output in outputs]
    assert found == [EngineOutput("r", [1, 2, 3, 4], "length", 4, 9)]


async def test_merging_stops_at_what_says_more_than_tokens(rig: RpcRig) -> None:
    client = await rig.client()
    client.merge = True
    async with client.generate(request("r")) as outputs:
        await until(lambda: rig.handler.requests)
        for token in (1, 2):
            rig.server.send([EngineOutput("r", [token])])
        rig.server.send([EngineOutput("r", [], "error", error=ErrorInfo("EngineFailed", "no"))])
        await rig.round_trip(client)
        assert (await anext(outputs)).token_ids == [1, 2]
        with pytest.raises(EngineFailed):
            await anext(outputs)


async def test_outputs_arrive_in_order_and_the_stream_ends(rig: RpcRig) -> None:
    client = await rig.client()
    async with client.generate(request("r1")) as outputs:
        await until(lambda: rig.handler.requests)
        assert rig.handler.requests == [request("r1")]
        rig.server.send([token("r1", 1)])
        rig.server.send([token("r1", 2)])
        rig.server.send([token("r1", 3, last=True)])
        assert [output.token_ids async for output in outputs] == [[1], [2], [3]]
    assert rig.server.num_live == 0
    await rig.round_trip(client)
    assert rig.handler.aborted == []


async def test_one_step_is_one_frame_for_all_streams_of_a_frontend(rig: RpcRig) -> None:
    reader, writer = await rig.raw()
    writer.write(frame(Hello(PROTOCOL_VERSION)))
    assert isinstance(await read_frame(reader), Hello)
    names = [f"r{i}" for i in range(64)]
    for name in names:
        writer.write(frame(Generate(request(name))))
    await until(lambda: rig.server.num_live == 64)
    other = await rig.client()
    async with other.generate(request("elsewhere")) as outputs:
        await until(lambda: rig.server.num_live == 65)
        rig.server.send([token(name, 5) for name in [*names, "elsewhere", "unknown"]])
        step = await read_frame(reader)
        assert isinstance(step, Step)
        assert [output.request_id for output in step.outputs] == names
        assert (await anext(outputs)).token_ids == [5]
    rig.server.announce_drain()
    assert isinstance(await read_frame(reader), Draining)  # no other step was sent


async def test_leaving_early_aborts_on_the_worker(rig: RpcRig) -> None:
    client = await rig.client()
    async with client.generate(request("r1")) as outputs:
        await until(lambda: rig.handler.requests)
        rig.server.send([token("r1", 1)])
        async for _ in outputs:
            break
    await until(lambda: rig.handler.aborted == ["r1"])
    assert rig.server.num_live == 0
    rig.server.send([token("r1", 2)])  # a late output is dropped without an error
    await rig.round_trip(client)


async def test_release_reaches_the_worker_after_the_request_ended(rig: RpcRig) -> None:
    client = await rig.client()
    async with client.generate(request("r1")) as outputs:
        await until(lambda: rig.handler.requests)
        rig.server.send([token("r1", 1, last=True)])
        await anext(outputs)
    client.release("r1")
    await until(lambda: rig.handler.released == ["r1"])
    assert rig.handler.aborted == []


async def test_request_that_cannot_be_sent_leaves_no_stream_behind(rig: RpcRig) -> None:
    client = await rig.client()
    unsendable = EngineRequest("r1", [1], 1, SamplingParams(max_tokens=2**70))
    with pytest.raises(OverflowError):
        async with client.generate(unsendable):
            pass
    assert not client.connection()._streams
    async with client.generate(request("r1")) as outputs:  # the id is free
        await until(lambda: rig.handler.requests)
        rig.server.send([token("r1", 1, last=True)])
        assert [output.token_ids async for output in outputs] == [[1]]


async def test_output_that_cannot_be_sent_ends_its_own_request_only(rig: RpcRig) -> None:
    client = await rig.client()
    async with client.generate(request("r1")) as bad, client.generate(request("r2")) as good:
        await until(lambda: len(rig.handler.requests) == 2)
        rig.server.send([EngineOutput("r1", [2**70]), token("r2", 7, last=True)])
        assert [output.token_ids async for output in good] == [[7]]
        with pytest.raises(EngineFailed, match="cannot be sent"):
            await anext(bad)
    await until(lambda: rig.handler.aborted == ["r1"])
    assert rig.server.num_live == 0


async def test_cancelled_consumer_aborts_on_the_worker(rig: RpcRig) -> None:
    client = await rig.client()

    async def consume() -> None:
        async with client.generate(request("r1")) as outputs:
            async for _ in outputs:
                pass

    task = asyncio.create_task(consume())
    await until(lambda: rig.handler.requests)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await until(lambda: rig.handler.aborted == ["r1"])


async def test_frontend_disconnect_aborts_its_requests_only(rig: RpcRig) -> None:
    leaving, staying = await rig.client(), await rig.client()
    async with staying.generate(request("stays")) as kept:
        lost = [leaving.generate(request(name)) for name in ("a", "b")]
        for stream in lost:
            await stream.__aenter__()
        await until(lambda: rig.server.num_live == 3)
        await leaving.close()
        await until(lambda: sorted(rig.handler.aborted) == ["a", "b"])
        with pytest.raises(InstanceLost):
            await anext(lost[0])
        rig.server.send([token("stays", 1, last=True), token("a", 1)])
        assert (await anext(kept)).token_ids == [1]


async def test_worker_loss_raises_after_what_already_arrived(rig: RpcRig) -> None:
    lost: list[str] = []
    client = RpcClient(info_for(rig.addresses))
    client.on_lost = lambda: lost.append("once")
    await client.connect(5.0)
    async with client.generate(request("r1")) as outputs:
        await until(lambda: rig.handler.requests)
        rig.server.send([token("r1", 1)])
        await rig.server.close()
        assert (await anext(outputs)).token_ids == [1]
        with pytest.raises(InstanceLost, match="agg-0"):
            await anext(outputs)
    assert lost == ["once"]
    assert not client.connected
    with pytest.raises(InstanceLost):
        async with client.generate(request("r2")):
            pass
    await client.close()


async def refused(client: RpcClient) -> OutputStream:
    async with client.generate(request("r1")) as outputs:
        async for _ in outputs:
            pass
    return outputs


@pytest.mark.parametrize(
    ("raised", "arrives"),
    [
        (InvalidRequest("too long"), InvalidRequest),
        (Overloaded("full", retry_after_s=3.5), Overloaded),
        (RuntimeError("a bug"), EngineFailed),
    ],
)
async def test_refusal_ends_the_stream_with_its_error_class(
    rig: RpcRig, raised: Exception, arrives: type[ServingError]
) -> None:
    client = await rig.client()
    rig.handler.refusal = raised
    with pytest.raises(arrives) as caught:
        await refused(client)
    assert type(caught.value) is arrives
    if isinstance(raised, Overloaded) and isinstance(caught.value, Overloaded):
        assert caught.value.retry_after_s == 3.5
    rig.handler.refusal = None
    assert rig.server.num_live == 0
    await rig.round_trip(client)  # the connection is still good


async def test_request_id_of_another_frontend_is_refused(rig: RpcRig) -> None:
    first, second = await rig.client(), await rig.client()
    async with first.generate(request("r1")) as outputs:
        await until(lambda: rig.server.num_live == 1)
        with pytest.raises(InvalidRequest):
            await refused(second)
        rig.server.send([token("r1", 1, last=True)])
        assert (await anext(outputs)).token_ids == [1]


@pytest.mark.parametrize(
    "error",
    [
        InvalidRequest("m"),
        InvalidRequest("m", param="logit_bias", code="invalid_token"),
        ModelNotFound("m"),
        Overloaded("m", retry_after_s=2.0),
        NoInstances("m", retry_after_s=2.0),
        QueuedTooLong("m", retry_after_s=2.0),
        DeadlineExceeded("prefill", 2.5),
        DeadlineExceeded("first token", 2.5, setting="deadlines.first_token_s"),
        EngineFailed("m"),
    ],
)
def test_errors_survive_the_journey(error: ServingError) -> None:
    with pytest.raises(type(error)) as caught:
        raise_error(ErrorInfo.from_error(error))
    assert type(caught.value) is type(error)
    assert str(caught.value) == str(error)
    for field in ("param", "code"):
        assert getattr(caught.value, field, None) == getattr(error, field, None)


@pytest.mark.parametrize("kind", ["KvTransferFailed", "InstanceLost", "SomethingNew", ""])
def test_kinds_of_other_layers_become_engine_failures(kind: str) -> None:
    with pytest.raises(EngineFailed, match="why"):
        raise_error(ErrorInfo(kind, "why"))
