"""Makes workers that can be broken: on PYTHONPATH of a deployment, it patches `serving.worker`.

Signals break the engine of a running worker, and seeds make a request a poisonous one.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import os
import signal
import sys
import time
from types import ModuleType
from typing import Any

BREAK, HANG, GROW = signal.SIGUSR1, signal.SIGUSR2, signal.SIGRTMIN + 1
CRASH_SEED, BREAK_SEED = 666_001, 666_002
PATCHED = "serving.worker.worker"


class _Finder(importlib.abc.MetaPathFinder):
    def find_spec(self, name: str, path: Any, target: Any = None) -> Any:
        if name != PATCHED:
            return None
        sys.meta_path.remove(self)
        spec = importlib.machinery.PathFinder.find_spec(name, path)
        assert spec is not None
        assert spec.loader is not None
        load = spec.loader.exec_module

        def load_and_patch(module: ModuleType) -> None:
            load(module)
            _patch(module)

        spec.loader.exec_module = load_and_patch  # type: ignore[method-assign]
        return spec


def _patch(module: Any) -> None:
    worker_class = module.Worker
    initialise, generate = worker_class.__init__, worker_class.on_generate

    def __init__(self: Any, settings: Any, epoch: int, engine: Any, *rest: Any) -> None:
        initialise(self, settings, epoch, engine, *rest)
        signal.signal(BREAK, lambda *_: _break(engine))
        signal.signal(HANG, lambda *_: _hang(engine))
        signal.signal(GROW, lambda *_: setattr(self, "ballast", bytearray(b"1" * (64 << 20))))

    def on_generate(self: Any, request: Any) -> None:
        generate(self, request)
        if request.sampling.seed == CRASH_SEED:
            os.kill(os.getpid(), signal.SIGKILL)
        elif request.sampling.seed == BREAK_SEED:
            _break(self._engine)

    worker_class.__init__, worker_class.on_generate = __init__, on_generate


def _scheduler(engine: Any) -> Any:
    shared = getattr(engine, "_shared", None)
    return engine._scheduler if shared is None else shared.scheduler


def _break(engine: Any) -> None:
    """The bookkeeping fails with the next step."""

    def fail(**_: Any) -> None:
        raise KeyError("a block that nobody holds")

    _scheduler(engine).plan_step = fail


def _hang(engine: Any) -> None:
    """The next step never ends. A mock engine computes on the event loop, which then hangs too."""

    def hang(*_: Any, **__: Any) -> None:
        time.sleep(3600)

    runner = getattr(engine, "_runner", None)
    if runner is None:
        _scheduler(engine).plan_step = hang
    else:
        runner.launch = hang


if os.environ.get("SERVING_PROGRAM", "").startswith("worker-"):
    sys.meta_path.insert(0, _Finder())
