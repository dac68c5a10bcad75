"""How do times become numbers?"""

import pytest

from chatlearn_vllm.bench.measure import (
    Pass,
    Stopwatch,
    acceptance,
    latency,
    of_rounds,
    percentile,
    summary,
    throughput,
)


@pytest.mark.parametrize(
    ("values", "share", "expected"),
    [
        ([7.0], 99, 7.0),
        ([1.0, 2.0, 3.0, 4.0], 50, 2.5),
        ([4.0, 1.0, 3.0, 2.0], 100, 4.0),
        (list(range(101)), 90, 90.0),
        (list(range(101)), 99, 99.0),
        ([0.0, 10.0], 90, 9.0),
    ],
)
def test_percentile(values, share, expected):
    assert percentile(values, share) == pytest.approx(expected)


def test_summary_of_nothing_is_none():
    assert summary([]) is None
    assert summary([1.0, 3.0]) == {"mean": 2.0, "p50": 2.0, "p90": 2.8, "p99": 2.98, "num": 2}


def test_the_middle_pass_counts():
    passes = [Pass(2.0, 8, 800), Pass(1.0, 8, 800), Pass(4.0, 8, 800)]
    result = throughput(passes, 8)
    assert result["output_tokens_per_s"] == 400.0
    assert result["requests_per_s"] == 4.0
    assert result["seconds_for_all"] == 2.0
    assert not result["is_scaled"]


def test_fewer_completions_than_asked_for_are_scaled_and_said_so():
    result = throughput([Pass(2.0, 16, 1600)], 1024)
    assert result["output_tokens_per_s"] == 800.0
    assert result["measured_completions"] == 16
    assert result["seconds_for_all"] == 128.0
    assert result["is_scaled"]


def test_tokens_of_one_step_share_the_time_since_the_last(monkeypatch):
    now = iter([10.0, 10.5, 11.1])
    watch = Stopwatch(start=9.0)
    monkeypatch.setattr("chatlearn_vllm.bench.measure.time.perf_counter", lambda: next(now))
    watch.tokens("a", 1)
    watch.tokens("a", 1)
    watch.tokens("a", 0)
    watch.tokens("a", 3)
    assert watch.between == pytest.approx([0.5, 0.2, 0.2, 0.2])
    result = latency([watch])
    assert result["ttft_s"]["p50"] == 1.0
    assert result["request_s"]["p99"] == pytest.approx(2.1)
    assert result["num_requests"] == 1
    assert latency([watch, watch])["inter_token_s"]["num"] == 8


def test_all_passes_and_drafts_of_all_rounds_count_and_the_largest_memory():
    first, second = (
        {
            "throughput": throughput([Pass(seconds, 8, 800)], 8),
            "memory": {"device_bytes": device, "host_rss_bytes": 3},
            "speculation": {"method": "ngram", **acceptance(10, 50, accepted)},
            "latency": {"round": seconds},
        }
        for seconds, device, accepted in ((1.0, [5, 1], 40), (3.0, [2, 4], 20))
    )
    both = of_rounds(first, second)
    assert [one["seconds"] for one in both["throughput"]["passes"]] == [1.0, 3.0]
    assert both["memory"] == {"device_bytes": [5, 4], "host_rss_bytes": 3}
    assert both["speculation"] == {
        "method": "ngram", "drafts": 20, "draft_tokens": 100, "accepted_tokens": 60,
        "acceptance_rate": 0.6, "mean_accepted_length": 4.0,
    }  # fmt: skip
    assert both["latency"] == {"round": 3.0}
