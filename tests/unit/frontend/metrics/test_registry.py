"""What `/metrics` shows about routing and about workers."""

from __future__ import annotations

from serving.frontend.metrics.registry import Metrics
from serving.load_report import LoadReport


def test_transfer_counters_survive_a_restart_of_their_worker() -> None:
    metrics = Metrics()

    def report(epoch: int, received: int) -> LoadReport:
        return LoadReport("decode-0", epoch, 1, 0, 0, 4, 5, 6, received, 1, kv_transport="ucx")

    metrics.observe_load(report(1, 100))
    metrics.observe_load(report(1, 150))
    metrics.observe_load(report(2, 30))
    metrics.observe_load(report(1, 170))  # late, of the epoch before: fenced
    page = metrics.render().decode()
    assert 'serving_kv_transfer_bytes_total{instance="decode-0",transport="ucx"} 180.0' in page
    assert 'serving_instance_active_blocks{instance="decode-0"} 4.0' in page
    metrics.forget_instance("decode-0")
    page = metrics.render().decode()
    assert "serving_instance_active_blocks{" not in page
    assert 'serving_kv_transfer_bytes_total{instance="decode-0",transport="ucx"} 180.0' in page


def test_routing_is_counted_by_policy_role_and_instance() -> None:
    metrics = Metrics()
    metrics.observe_routed("kv", "prefill", "prefill-0", prompt_tokens=100, hit_tokens=64)
    metrics.observe_index("prefill-0", "gap")
    page = metrics.render().decode()
    labels = 'instance="prefill-0",policy="kv",role="prefill"'
    assert f"serving_routed_requests_total{{{labels}}} 1.0" in page
    assert 'serving_prefix_hit_tokens_total{instance="prefill-0",role="prefill"} 64.0' in page
    assert 'serving_kv_index_events_total{instance="prefill-0",kind="gap"} 1.0' in page
