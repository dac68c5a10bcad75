"""Which devices does a device_mapping name, and what is said about one that does not fit?"""

import time

import pytest

from chatlearn_vllm.config import ConfigError, load_config
from chatlearn_vllm.config.devices import MAX_DEVICES, draw_replicas, parse_device_mapping
from chatlearn_vllm.job import place
from tests.config import strategy_job


@pytest.mark.parametrize(
    ("text", "devices"),
    [
        ("list(range(0,12))", tuple(range(12))),
        ("list(range(0,4))+list(range(8,12))", (0, 1, 2, 3, 8, 9, 10, 11)),
        (" list( range( 4 ) ) ", (0, 1, 2, 3)),
        ("list(range(6, 0, -2))", (6, 4, 2)),
        ("list([4,5, 12])", (4, 5, 12)),
        ("[6, 7]", (6, 7)),
        ("[6,7] + list(range(2))+[9]", (6, 7, 0, 1, 9)),
        ("range(2,4)", (2, 3)),
        ("[]", ()),
        ([3, 1], (3, 1)),
    ],
)
def test_lists_and_sums_of_ranges_are_read(text, devices):
    assert parse_device_mapping(text) == devices


@pytest.mark.parametrize(
    ("text", "rule"),
    [
        ("__import__('os').system('touch /tmp/x')", "\"__import__('os').sys\" is not understood"),
        ("list(range(0,8)).__class__", "'.__class__' is not understood"),
        ("[i for i in range(8)]", "'i for i in range(8)]' is not understood"),
        ("list(range(0,len([1])))", "'len([1])))' is not understood"),
        ("list(range(0,9999999999999999999999))", "'9999999999999999999999' is not understood"),
        ("list(range(65536))+[1]+list(range(65536))", "names more than 65536 devices"),
        ("list(range(0,99999))", "names more than 65536 devices"),
        ("[" * 70000, "is 70000 characters long"),
        ("[" * 60000, "'[' is not understood"),
        ("list(range(0,8)", "ends too early"),
        ("list(range(0,8)))", "')' is not understood"),
        ("list(range(0,8))-[1]", "'-' is not understood"),
        ("list(range())", "range takes a stop, or start, stop and a step other than 0"),
        ("list(range(0,8,0))", "range takes a stop"),
        ("[1 2]", "'2' is not understood"),
        ("[1,]", "']' is not understood"),
        ("", "ends too early"),
        ("8", "'8' is not understood"),
        (8, "must be a list of devices, as in list(range(0,8))"),
        ([1, "2"], "must be a list of devices"),
        ([True], "must be a list of devices"),
    ],
)
def test_anything_else_is_refused(text, rule):
    with pytest.raises(ValueError) as error:
        parse_device_mapping(text)
    assert str(error.value).startswith(rule)


def test_replicas_are_drawn_with_what_is_left():
    assert draw_replicas([4, 5, 6, 12, 13], 2).splitlines() == [
        "device        4    5    6    12   13",
        "replica.rank  0.0  0.1  1.0  1.1  left",
    ]
    assert len(draw_replicas(range(40), 4).splitlines()) == 6


JOB = """
models:
  policy: {{device_mapping: {policy}, tensor_model_parallel_size: {tp}}}
  reward: {{num_cpu: 1}}
  trainer: {{{trainer}, trainable: True}}
runtime: {{sample_per_episode: 16, train_global_batch_size: 8, colocation: {colocation}}}
"""


def write_job(write, policy="[0, 1, 2, 3]", tp=1, trainer="device_mapping: [0, 1]", colocation=()):
    text = JOB.format(policy=policy, tp=tp, trainer=trainer, colocation=[*colocation])
    return write("job.yaml", text)


def test_the_number_of_devices_follows_from_the_mapping(write):
    models = load_config(write_job(write, tp=2)).models
    assert (models["policy"].num_gpu, models["policy"].num_replica) == (4, 2)
    assert (models["trainer"].num_gpu, models["trainer"].data_parallel_size) == (2, 2)


@pytest.mark.parametrize(
    ("keys", "line"),
    [
        ({"policy": "[0, 1, 1]"}, "models.policy.device_mapping=[0, 1, 1]: names device 1 more "
         "than once"),
        ({"policy": "[0, -1]"}, "models.policy.device_mapping=[0, -1]: devices count from 0"),
        ({"policy": "list(range(2))"}, "models.policy.device_mapping='list(range(2))': must be a "
         "valid list"),
        ({"trainer": "num_gpu: 2"}, "models.trainer.num_gpu=2: needs a device_mapping, too, as "
         "models.policy has one"),
        ({"trainer": "num_gpu: 2, device_mapping: [0]"}, "models.trainer.num_gpu=2: "
         "device_mapping names 1 devices; leave num_gpu out"),
        ({"colocation": ["policy,trainer"]}, "runtime.colocation=['policy,trainer']: leave it out: "
         "who shares devices follows from device_mapping"),
        ({"policy": "[0, 1, 5]", "tp": 2}, "models.policy.device_mapping=[0, 1, 5]: 3 devices are "
         "not a multiple of tensor_model_parallel_size x pipeline_model_parallel_size = 2 x 1:\n"
         "      device        0    1    5\n      replica.rank  0.0  0.1  left"),
    ],
)  # fmt: skip
def test_a_mapping_that_does_not_fit_is_named_with_its_rule(write, keys, line):
    with pytest.raises(ConfigError) as error:
        load_config(write_job(write, **keys))
    (problem,) = error.value.problems
    assert line in str(problem)


def test_a_job_of_many_devices_is_read_and_drawn_in_seconds(write):
    path = write("job.yaml", strategy_job.JOB)
    start = time.process_time()
    job = load_config(path, [f"actor_infer.device_mapping=list(range(0,{MAX_DEVICES}))"])
    drawing = place(job).describe().splitlines()
    assert time.process_time() - start < 20  # a minute and more where each looks at all others
    assert len(drawing) == 1 + MAX_DEVICES + 1  # names of the columns, and the reward on a CPU
