"""etcd's data, which nothing depends on: leases that are gone with their holders anyway.

So damaged data is no reason to ask a person: etcd starts empty, and everybody registers again.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from serving.deploy.processes.launchers import RUN

DATA = RUN / "etcd"
DAMAGED = RUN / "etcd.damaged"


def set_etcd_data_aside(data: Path = DATA, damaged: Path = DAMAGED) -> bool:
    """Let etcd start empty; its data stay in `DAMAGED` for inspection. False when there are none."""
    if not data.is_dir():
        return False
    shutil.rmtree(damaged, ignore_errors=True)
    data.replace(damaged)
    return True
