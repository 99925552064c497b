"""What an instance reports about itself: the one definition of every figure.

A field of `LoadReport` says what it counts, how `/metrics` names it, and whether people see it in
`/ready` and in `snakemake status`. Those three read the definition and name none of its counters,
so a new counter is a new field here, and a line where it is counted.
"""

from __future__ import annotations

from functools import cache
from typing import Annotated, Any, get_args, get_type_hints

from msgspec import Struct


class Figure(Struct, frozen=True):
    """How people see one field of `LoadReport`.

    `metric`: its name in `/metrics`, where that is not the field's. `in_ready`: it is a key of
    each row in `/ready`. `column`: its heading in `snakemake status`.
    """

    help: str
    metric: str = ""
    in_ready: bool = False
    column: str = ""


class GaugeFigure(Figure, frozen=True):
    """The value now: `serving_instance_<metric>`."""


class CounterFigure(Figure, frozen=True):
    """A total since the instance started: `serving_<metric>_total`."""


class TransferCounterFigure(CounterFigure, frozen=True):
    """A counter whose samples carry the label `transport` too."""


class LabelFigure(Figure, frozen=True):
    """A text. `/metrics` does not show it by itself."""


class LoadReport(Struct, frozen=True, array_like=True):
    """Published at most once per engine step, with its `KvEventBatch` if there is one, and at least
    once a second. The order of the fields is the wire format: new ones come last.

    The engine fills in what it knows; its worker adds its own name and the KV transfers.
    """

    instance_id: str = ""
    epoch: int = 0
    num_running: Annotated[
        int, GaugeFigure("Requests in the engine's batch.", in_ready=True, column="running")
    ] = 0
    num_waiting: Annotated[
        int, GaugeFigure("Requests queued in the engine.", in_ready=True, column="waiting")
    ] = 0
    queued_tokens: Annotated[
        int, GaugeFigure("Prompt tokens to be computed; cached ones are not counted.")
    ] = 0
    active_blocks: Annotated[
        int, GaugeFigure("KV blocks held by running requests.", in_ready=True, column="active")
    ] = 0
    cached_blocks: Annotated[
        int,
        GaugeFigure("Evictable KV blocks kept for prefix hits.", in_ready=True, column="cached"),
    ] = 0
    num_blocks: Annotated[int, GaugeFigure("KV blocks in all.", in_ready=True, column="blocks")] = 0
    kv_bytes_received: Annotated[
        int,
        TransferCounterFigure(
            "Bytes of KV received from prefill workers.", metric="kv_transfer_bytes", in_ready=True
        ),
    ] = 0
    kv_transfers: Annotated[
        int, TransferCounterFigure("KV transfers completed.", in_ready=True)
    ] = 0
    kv_transfer_failures: Annotated[
        int, TransferCounterFigure("KV transfers that failed.", in_ready=True)
    ] = 0
    kv_transfer_seconds: Annotated[float, TransferCounterFigure("Time spent in KV transfers.")] = (
        0.0
    )
    kv_transport: Annotated[
        str, LabelFigure("The transport that brings KV here (`ucx`, `tcp`, `nixl`).", in_ready=True)
    ] = ""
    local_prefill_fallbacks: Annotated[
        int,
        TransferCounterFigure(
            "Prompts computed again because their KV could not be fetched.", in_ready=True
        ),
    ] = 0
    preemptions: Annotated[
        int, CounterFigure("Requests preempted for want of blocks.", in_ready=True)
    ] = 0
    kv_route: Annotated[
        str,
        LabelFigure(
            "How the latest KV travelled: `cuda_ipc` (from GPU to GPU), `tcp`.", in_ready=True
        ),
    ] = ""
    host_cached_blocks: Annotated[int, GaugeFigure("Evicted KV blocks kept in host memory.")] = 0
    num_host_blocks: Annotated[int, GaugeFigure("KV blocks that host memory has room for.")] = 0
    offloaded_blocks: Annotated[int, CounterFigure("Evicted KV blocks copied to host memory.")] = 0
    onloaded_blocks: Annotated[
        int, CounterFigure("KV blocks copied back from host memory for a prefix hit.")
    ] = 0


class KvTransferTotals(Struct):
    """Counts the KV that a decode worker fetches. A worker copies each field to the field of
    `LoadReport` that has its name."""

    kv_bytes_received: int = 0
    kv_transfers: int = 0
    kv_transfer_failures: int = 0
    kv_transfer_seconds: float = 0.0
    kv_transport: str = ""
    local_prefill_fallbacks: int = 0
    kv_route: str = ""


@cache
def figures(definition: type[LoadReport]) -> dict[str, Figure]:
    """The figures of a report by field, in the order of their definition."""
    hints = get_type_hints(definition, include_extras=True)
    return {
        name: figure
        for name in definition.__struct_fields__
        for figure in get_args(hints[name])
        if isinstance(figure, Figure)
    }


def ready_row(report: LoadReport) -> dict[str, Any]:
    """What `/ready` shows of a report."""
    shown = figures(type(report)).items()
    return {name: getattr(report, name) for name, figure in shown if figure.in_ready}


def status_columns(definition: type[LoadReport] = LoadReport) -> dict[str, str]:
    """The headings in `snakemake status`, by the key that the row has in `/ready`."""
    return {name: f.column for name, f in figures(definition).items() if f.column}
