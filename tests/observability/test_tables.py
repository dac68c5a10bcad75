"""Are results readable as plain text?"""

from chatlearn_vllm.observability.tables import metric_table, sample_table


def test_metrics_are_shown_with_their_change():
    metrics = {"eval/reward_mean": 0.8125, "eval/accuracy": 1.0, "eval/num_samples": 16}

    shown = metric_table(metrics, before={"eval/reward_mean": 0.75, "eval/num_samples": 16})

    assert shown.splitlines() == [
        "metric             value   change",
        "eval/reward_mean  0.8125  +0.0625",
        "eval/accuracy          1        -",
        "eval/num_samples      16       +0",
    ]


def test_samples_are_cut_to_a_line_each():
    columns = {"prompt": ["1+1=", "a\nb", "c"], "answer": ["2", "x" * 60, ""], "reward": [1.0] * 3}

    assert sample_table(columns, num_rows=2).splitlines() == [
        "prompt  answer" + 44 * " " + "reward",
        "1+1=    2" + 49 * " " + "1",
        "a\\nb    " + 45 * "x" + "...  1",
    ]
    assert len(sample_table(columns, num_rows=9).splitlines()) == 4
