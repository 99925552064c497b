"""The event plane: KV events, load reports and snapshots over NATS.

Losing NATS never stops anybody: what is published meanwhile is dropped and counted, and the
sequence numbers of KV events show every receiver that something is missing. A receiver then asks
the worker for a snapshot. This module numbers, splits, sends and receives; it does not know what
blocks mean.

Subjects: `{namespace}.kv.{instance_id}`, `.load.{instance_id}`, `.snapshot.{instance_id}`, and
`.routed`, by which frontends tell each other what they send where.

    plane.py   the connection, publishing, subscribing
    pieces.py  messages cut to size
"""

from serving.events.pieces import KvSnapshot
from serving.events.plane import EventCounters, EventPlane

__all__ = ["EventCounters", "EventPlane", "KvSnapshot"]
