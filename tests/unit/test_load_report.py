"""A figure of a load report is defined once, and seen wherever its definition says."""

from __future__ import annotations

from typing import Annotated

import msgspec
from serving.deploy.report.status import instance_table
from serving.frontend.metrics.instances import InstanceMetrics
from serving.load_report import (
    CounterFigure,
    GaugeFigure,
    KvTransferTotals,
    LoadReport,
    TransferCounterFigure,
    figures,
    ready_row,
)

FIRST_RELEASED_FIELDS = (
    *("instance_id", "epoch", "num_running", "num_waiting", "queued_tokens", "active_blocks"),
    *("cached_blocks", "num_blocks", "kv_bytes_received", "kv_transfers", "kv_transfer_failures"),
    *("kv_transfer_seconds", "kv_transport", "local_prefill_fallbacks", "preemptions", "kv_route"),
    *("host_cached_blocks", "num_host_blocks", "offloaded_blocks", "onloaded_blocks"),
)


class ExtendedReport(LoadReport, frozen=True, array_like=True):
    """As if somebody had added two figures to the definition."""

    num_swaps: Annotated[int, CounterFigure("Swaps.", in_ready=True, column="swaps")] = 0
    num_idle: Annotated[int, GaugeFigure("Idle ones.")] = 0


def samples(metrics: InstanceMetrics) -> dict[str, float]:
    return {sample.name: sample.value for m in metrics.collect() for sample in m.samples}


def test_a_new_figure_appears_in_metrics_ready_and_status_without_any_other_change() -> None:
    report = ExtendedReport("decode-0", 1, num_swaps=41, num_idle=7)
    metrics = InstanceMetrics(ExtendedReport)
    metrics.add(report)
    assert samples(metrics)["serving_num_swaps_total"] == 41
    assert samples(metrics)["serving_instance_num_idle"] == 7
    row = ready_row(report)
    assert row["num_swaps"] == 41
    assert "num_idle" not in row
    titles, cells = instance_table([row], {}, definition=ExtendedReport)
    assert dict(zip(titles.split(), cells.split(), strict=True))["swaps"] == "41"


def test_every_figure_of_a_load_report_is_seen_where_its_definition_says() -> None:
    names = figures(LoadReport)
    values = {name: 100 + i for i, name in enumerate(names)}
    report = msgspec.structs.replace(LoadReport("decode-0", 1), **values)
    metrics = InstanceMetrics()
    metrics.add(report)
    for name, figure in names.items():
        metric = figure.metric or name
        if isinstance(figure, CounterFigure):
            assert samples(metrics)[f"serving_{metric}_total"] == values[name]
        elif isinstance(figure, GaugeFigure):
            assert samples(metrics)[f"serving_instance_{metric}"] == values[name]
        assert ready_row(report).get(name) == (values[name] if figure.in_ready else None)
        titles, cells = instance_table([ready_row(report)], {})
        shown = dict(zip(titles.split(), cells.split(), strict=True))
        assert shown.get(figure.column) == (str(values[name]) if figure.column else None)


def test_what_status_shows_is_a_key_of_ready() -> None:
    assert all(figure.in_ready for figure in figures(LoadReport).values() if figure.column)


def test_new_fields_come_after_those_that_are_on_the_wire() -> None:
    fields = LoadReport.__struct_fields__
    assert fields[: len(FIRST_RELEASED_FIELDS)] == FIRST_RELEASED_FIELDS
    assert len(msgspec.msgpack.decode(msgspec.msgpack.encode(LoadReport("a", 1)))) == len(fields)


def test_every_kv_transfer_total_is_a_figure_of_the_load_report() -> None:
    shown = figures(LoadReport)
    totals = set(KvTransferTotals.__struct_fields__)
    assert totals <= set(shown)
    assert {n for n, figure in shown.items() if isinstance(figure, TransferCounterFigure)} <= totals
