"""Put etcd and nats-server into `results/bin`, with a record of their versions and origins."""

import json
import shutil
from pathlib import Path

from serving.deploy.binaries.binary import Binary
from serving.deploy.binaries.etcd import resolve_etcd
from serving.deploy.binaries.nats import resolve_nats
from serving.deploy.rule_script import rule_script


def install(binary: Binary, target: Path) -> None:
    """A copy instead of a link, because it outlives the environment or package it came from."""
    temporary = target.with_suffix(".tmp")
    shutil.copy(binary.path, temporary)
    temporary.chmod(0o755)
    temporary.replace(target)


with rule_script(snakemake) as (_, report):
    etcd, nats = Path(snakemake.output.etcd), Path(snakemake.output.nats)
    found = {
        "etcd": (resolve_etcd(etcd.parent / "cache", report=report), etcd),
        "nats-server": (resolve_nats(), nats),
    }
    record = {}
    for name, (binary, target) in found.items():
        install(binary, target)
        record[name] = {"version": binary.version, "origin": binary.origin}
        report(f"{name} {binary.version} from {binary.origin}")
    Path(snakemake.output.versions).write_text(json.dumps(record, indent=2) + "\n")
