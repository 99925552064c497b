"""A deployment in virtual time: traces in, latencies and hit rates out.

Routers and policies are the ones that serve (`kv_router`), and so is the admission of the engines
(`engine/core`); they get the same messages. The rest is a model: steps that take time by the token,
and a network that takes time by the message. An hour of a thousand requests takes about a second.

    clock.py         virtual time
    trace.py         recorded workloads
    worker.py        one engine: admission, blocks, one prefill at a time
    decode_batch.py  sequences that decode together
    cluster.py       frontends, workers and the messages between them
    outcome.py       latencies and hit rates
    capacity.py      how many prefill and decode workers a workload needs
"""
