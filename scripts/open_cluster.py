"""Tell nodes that join what is served here. Output: `run/cluster.open`."""

from pathlib import Path

from serving.config import parse
from serving.deploy.cluster import membership as cluster
from serving.deploy.planning.topology import address
from serving.deploy.rule_script import reporting
from serving.engine.manifest import load_manifest

with reporting(snakemake.log[0]) as report:
    config = parse(snakemake.config)
    endpoint = address(config.etcd.host, config.etcd.port)
    cluster.tell(config, load_manifest(Path(snakemake.input.engine).parent), endpoint)
    Path(snakemake.output[0]).write_text(f"{endpoint}\n")
    report(f"nodes can join at {endpoint}")
