"""Is it said where a key belongs that stands in the wrong place of a strategy file?"""

import pytest

from chatlearn_vllm.config.strategies import keys
from chatlearn_vllm.config.strategies.homes import home_of
from tests.config.strategy_job import CONFIG, JOB, problems_of


@pytest.mark.parametrize(
    ("key", "place"),
    [
        ("temperature", "actor_infer.generating_args"),
        ("actor_infer.temperature", "actor_infer.generating_args"),
        ("actor_infer.min_tokens", "actor_infer.generating_args"),
        ("actor_infer.gpu_memory_utilization", "actor_infer.strategy_args.strategy_config"),
        ("actor_infer.generating_args.max_num_seqs", "actor_infer.strategy_args.strategy_config"),
        ("actor_infer.strategy_config", "actor_infer.strategy_args"),
        ("actor_infer.model_args.device_mapping", "actor_infer"),
        ("actor_train.learning_rate", "actor_train.training_args"),
        ("actor_train.sequence_parallel", "actor_train.strategy_args.strategy_config"),
        ("reference.tensor_model_parallel_size", "reference.strategy_args.strategy_config"),
        ("rewards.rule.temperature", "rewards.rule.generating_args"),
        ("rewards.rule.tag", "actor_train.data_args"),
        ("validation.num_beams", "validation.generating_args"),
        ("strategy_args", "a role, such as actor_infer"),
    ],
)
def test_a_key_in_the_wrong_map_is_told_its_own(key, place):
    *path, name = key.split(".")
    assert (
        home_of(tuple(path), name, {} if path else keys.TOP)
        == f"unknown key here; it belongs in {place}"
    )


@pytest.mark.parametrize(
    ("key", "rule"),
    [
        ("actor_train.training_args.max_grad_norm", "unknown key here; it belongs at the top of "
         "the file"),
        ("actor_train.lr", "unknown key; it is called learning_rate here, in "
         "actor_train.training_args"),
        ("actor_infer.num_episode", "unknown key; it is called max_steps here, at the top of the "
         "file"),
        ("num_episode", "unknown key; it is called max_steps here"),
        ("num_generations", "unknown key: num_return_sequences_in_group, at the top, says it"),
        ("inference_engine", "unknown key: strategy_args.strategy_name says which engine a role "
         "has: vllm or hf_infer"),
        ("use_vllm", "unknown key: strategy_args.strategy_name says which engine a role has: vllm "
         "or hf_infer"),
        ("actor_train.num_gpu", "unknown key: device_mapping of the role says it"),
        ("actor_infer.device_maping", None),
        ("what.is_this", None),
    ],
)  # fmt: skip
def test_a_key_by_another_name_is_told_that_of_this_dialect(key, rule):
    *path, name = key.split(".")
    assert home_of(tuple(path), name, {} if path else keys.TOP) == rule


def test_parallel_sizes_have_the_name_of_the_engine_that_they_are_of(write):
    path = write("job.yaml", JOB)
    (line,) = problems_of(path, [f"{CONFIG}tensor_model_parallel_size=2"])
    assert line.endswith("unknown key; it is called tensor_parallel_size here")
    config = "actor_train.strategy_args.strategy_config."
    (line,) = problems_of(path, [f"{config}tensor_parallel_size=2"])
    assert line.endswith("unknown key; it is called tensor_model_parallel_size here")


def test_a_server_is_told_to_be_of_the_other_dialect(write):
    path = write("job.yaml", JOB)
    for key in ("vllm_server", f"{CONFIG}vllm_server"):
        (line,) = problems_of(path, [f"{key}=http://a:1"])
        assert line == (
            f"command line: {key}='http://a:1': unknown key: a file that describes roles has no "
            "server mode, its engines run in the job; leave it out, or describe models "
            "(docs/server.md)"
        )


def test_the_place_is_told_in_one_line_with_the_value(write):
    path = write("job.yaml", JOB)
    (line,) = problems_of(path, ["actor_infer.temperature=0.5"])
    assert line == (
        "command line: actor_infer.temperature=0.5: unknown key here; it belongs in "
        "actor_infer.generating_args"
    )
