"""Discovery: which instances are alive, kept in etcd under leased keys.

A worker registers under `/{namespace}/instances/{instance_id}` (the value is `InstanceInfo` as
JSON). Its key disappears when the worker stops renewing its lease. Losing etcd changes nothing:
watchers keep the last known membership, and workers register again when etcd is back. This package
does not know what instances are for.

    discovery.py     one process' view of a namespace
    registration.py  keeps this process registered
    watch.py         follows the registrations of others
    presence.py      which of them count as up
    records.py       keys and values
    etcd.py          the client; the only module that knows etcd's libraries
"""

from serving.discovery.discovery import Discovery

__all__ = ["Discovery"]
