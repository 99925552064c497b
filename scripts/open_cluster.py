"""Publish this deployment's configuration for nodes that join. Output: `run/cluster.open`."""

from pathlib import Path

from serving.config import connect_address
from serving.deploy.cluster.cluster_record import publish_cluster
from serving.deploy.rule_script import rule_script
from serving.engine.manifest import load_manifest

with rule_script(snakemake) as (config, report):
    endpoint = connect_address(config.etcd.host, config.etcd.port)
    manifest = load_manifest(Path(snakemake.input.engine).parent)
    publish_cluster(config.sections(), manifest, endpoint)
    Path(snakemake.output[0]).write_text(f"{endpoint}\n")
    report(f"nodes can join at {endpoint}")
