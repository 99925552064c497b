"""Which model an instance belongs to: passes on what discovery and the event plane report."""

from __future__ import annotations

from collections.abc import Mapping

from serving.frontend.instances import Instances
from serving.load_report import LoadReport
from serving.protocol import InstanceInfo, KvEventBatch


class InstancesOfModels:
    """The instances of all models of a frontend. An instance's model card names its model.

    An instance of a model that is not served here goes to the first model, whose router refuses it
    and shows the reason.
    """

    def __init__(self, by_model: Mapping[str, Instances]) -> None:
        """`by_model` has at least one name."""
        self._by_model = dict(by_model)
        self._first = next(iter(self._by_model.values()))
        self._homes: dict[str, Instances] = {}

    def up(self, info: InstanceInfo) -> None:
        """Discovery has a new registration."""
        home = self._by_model.get(info.model.name, self._first)
        self._homes[info.instance_id] = home
        home.up(info)

    def down(self, instance_id: str, epoch: int) -> None:
        """Its registration is gone."""
        # Its name stays known: while it drains, it still reports its load.
        if (home := self._homes.get(instance_id)) is not None:
            home.down(instance_id, epoch)

    def on_kv(self, batch: KvEventBatch) -> None:
        self._homes.get(batch.instance_id, self._first).on_kv(batch)

    def on_load(self, report: LoadReport) -> None:
        self._homes.get(report.instance_id, self._first).on_load(report)

    def on_reconnect(self) -> None:
        """Events may have been missed."""
        for instances in self._by_model.values():
            instances.on_reconnect()

    def close(self) -> None:
        """Close every connection."""
        for instances in self._by_model.values():
            instances.close()
