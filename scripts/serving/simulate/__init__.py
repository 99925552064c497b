"""A deployment in virtual time: traces in, latencies and hit rates out.

Routers and policies are the ones that serve (`kv_router`), fed with the same messages; only what
is under them is a model: engines that take time by the token, and a network that takes time by
the message. An hour of a thousand requests takes a second or so.

    clock.py    virtual time
    trace.py    recorded workloads
    worker.py   an engine: blocks, a prefill queue, a decode batch
    cluster.py  frontends, workers and what goes between them
    outcome.py  what came of it
    plan.py     how many prefill and decode workers a workload needs
"""
