"""The event plane: KV events, load reports and snapshots over NATS.

Losing NATS stops no process. Messages that are published meanwhile are dropped and counted, and the
sequence numbers of KV events show every receiver that it missed some. It then asks the worker for
a snapshot. This module numbers, splits, sends and receives; it does not know what
blocks mean.

Subjects: `{namespace}.kv.{instance_id}`, `.load.{instance_id}` and `.snapshot.{instance_id}`.

    plane.py       publishing, subscribing, snapshots
    connection.py  one connection to NATS, made again when it is lost
    pieces.py      messages cut to size
"""

from serving.events.connection import EventCounters, PlaneLimits
from serving.events.pieces import KvSnapshot
from serving.events.plane import EventPlane

__all__ = ["EventCounters", "EventPlane", "KvSnapshot", "PlaneLimits"]
