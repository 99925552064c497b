"""`python -m serving.deploy.healing`: keep the programs of this deployment running."""

from __future__ import annotations

import logging
import os
import time

from serving.deploy.healing.watcher import POLL_S, Watcher
from serving.deploy.processes.supervisor import Supervisor

log = logging.getLogger("serving.healing")


def main() -> None:
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    supervisord = os.getppid()
    watcher = Watcher(Supervisor())
    log.info("watching")
    while os.getppid() == supervisord:  # without supervisord nothing can be started
        try:
            watcher.look()
        except Exception:  # the next look may succeed: the disk is full, supervisord is busy
            log.exception("could not look after the programs")
        time.sleep(POLL_S)


if __name__ == "__main__":
    main()
