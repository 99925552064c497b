"""`python -m serving.worker FILE`: one worker process, until SIGTERM.

A process may host several instances, which share its event loop and nothing else. What one instance
does is in `instance.py`.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import sys
from collections.abc import Iterator
from typing import Any

import uvloop

from serving.config.process import WorkerSettings, announce_ready, beating, read_settings
from serving.errors import OperatorError
from serving.log_lines import BoundedFormatter
from serving.protocol import InstanceInfo
from serving.worker.health import BROKEN_STATUS, EngineBroken
from serving.worker.instance import serve

log = logging.getLogger("serving.worker")


async def run(settings: WorkerSettings) -> None:
    """Serve until SIGTERM or SIGINT; then drain and leave nothing behind."""
    stop = asyncio.Event()
    for signum in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(signum, stop.set)
    instances = settings.instances()
    infos: dict[str, InstanceInfo] = {}

    def registered(info: InstanceInfo) -> None:
        infos[info.instance_id] = info
        if len(infos) == len(instances):
            own = infos[settings.instance_id]
            announce_ready(
                settings.ready_file,
                instance_id=own.instance_id,
                epoch=own.epoch,
                max_model_len=own.model.max_model_len,
                kv_cache_tokens=own.num_blocks * own.model.block_size,
            )

    async with beating(settings.ready_file), asyncio.TaskGroup() as tasks:
        for instance in instances:
            tasks.create_task(serve(instance, stop, registered), name=instance.instance_id)
    log.info("stopped")


def main() -> None:
    settings = read_settings(sys.argv[1], WorkerSettings)
    handler = logging.StreamHandler()
    line = f"%(asctime)s {settings.instance_id} %(levelname)s %(name)s: %(message)s"
    handler.setFormatter(BoundedFormatter(line))
    logging.basicConfig(level=os.environ.get("LOG_LEVEL", "INFO"), handlers=[handler])
    try:
        uvloop.run(run(settings))
    except* OperatorError as group:  # task groups wrap their errors
        for line in dict.fromkeys(map(str, leaves(group))):  # instances tend to fail alike
            log.critical("%s", line)  # `deploy/processes/launch.py` looks for it
        is_broken = any(isinstance(exc, EngineBroken) for exc in leaves(group))
        sys.exit(BROKEN_STATUS if is_broken else 1)


def leaves(group: BaseExceptionGroup[Any]) -> Iterator[BaseException]:
    """The errors themselves, however deep they are wrapped."""
    for exc in group.exceptions:
        if isinstance(exc, BaseExceptionGroup):
            yield from leaves(exc)
        else:
            yield exc


if __name__ == "__main__":
    main()
