"""Put etcd and nats-server beside each other in `results/bin`, with a record of what they are.

Outputs: `etcd`, `nats` (executables) and `versions` (JSON).
"""

import json
import shutil
from pathlib import Path

from serving.deploy.binaries.binary import Binary
from serving.deploy.binaries.etcd import resolve_etcd
from serving.deploy.binaries.nats import resolve_nats
from serving.deploy.rule_script import reporting


def install(binary: Binary, target: Path) -> None:
    """A copy and not a link: it outlives the environment or package it came from."""
    temporary = target.with_suffix(".tmp")
    shutil.copy(binary.path, temporary)
    temporary.chmod(0o755)
    temporary.replace(target)


with reporting(snakemake.log[0]) as report:
    etcd, nats = Path(snakemake.output.etcd), Path(snakemake.output.nats)
    found = {
        "etcd": (resolve_etcd(etcd.parent / "cache", report=report), etcd),
        "nats-server": (resolve_nats(), nats),
    }
    for name, (binary, target) in found.items():
        install(binary, target)
        report(f"{name} {binary.version} from {binary.origin}")
    record = {name: {"version": b.version, "origin": b.origin} for name, (b, _) in found.items()}
    Path(snakemake.output.versions).write_text(json.dumps(record, indent=2) + "\n")
