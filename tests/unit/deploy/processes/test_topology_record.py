"""The record of what is deployed outlives a run that fails half-way."""

from pathlib import Path

from serving.deploy.processes.topology_record import (
    TOPOLOGY_FILE,
    TopologyRecord,
    read_record,
    remove_record,
    write_record,
)

RECORD = TopologyRecord(topology="agg", programs=["etcd", "nats"], engine_fingerprint="f")


def test_record_survives_the_removal_of_the_rules_output(tmp_path: Path) -> None:
    write_record(RECORD, tmp_path)
    (tmp_path / TOPOLOGY_FILE).unlink()  # as Snakemake does before it runs the rule again
    assert read_record(tmp_path) == RECORD


def test_nothing_is_recorded_after_a_stop(tmp_path: Path) -> None:
    assert read_record(tmp_path) is None
    write_record(RECORD, tmp_path)
    remove_record(tmp_path)
    assert read_record(tmp_path) is None
    assert not list(tmp_path.iterdir())
