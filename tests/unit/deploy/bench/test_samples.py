"""Samples of the frontend's metrics while a benchmark runs."""

from serving.deploy.bench.samples import Sample, hit_rates, parse

PAGE = """# HELP serving_completion_tokens_total Tokens generated.
# TYPE serving_completion_tokens_total counter
serving_completion_tokens_total{process="0"} 30.0
serving_completion_tokens_total{process="1"} 12.0
# TYPE serving_requests_in_flight gauge
serving_requests_in_flight 3.0
# TYPE serving_routed_prompt_tokens_total counter
serving_routed_prompt_tokens_total{role="agg",instance="agg-0"} 100.0
serving_routed_prompt_tokens_total{role="agg",instance="agg-1"} 50.0
# TYPE serving_prefix_hit_tokens_total counter
serving_prefix_hit_tokens_total{role="agg",instance="agg-0"} 80.0
"""


def test_a_metrics_page_of_several_processes_is_summed() -> None:
    sample = parse(PAGE, 1.5)
    assert (sample.at_s, sample.generated_tokens, sample.in_flight) == (1.5, 42.0, 3.0)
    assert sample.routed_tokens == {"agg-0": 100.0, "agg-1": 50.0}
    assert sample.hit_tokens == {"agg-0": 80.0}


def test_hit_rates_cover_the_time_between_two_samples() -> None:
    first = Sample(0, 0, 0, {"a": 100.0}, {"a": 100.0})
    last = Sample(9, 0, 0, {"a": 200.0, "b": 50.0, "idle": 0.0}, {"a": 125.0})
    assert hit_rates(first, last) == {"a": 0.25, "b": 0.0}
