"""Which rank goes on which device?"""

from chatlearn_vllm.config import JobConfig, ModelConfig, RuntimeConfig
from chatlearn_vllm.job import RankPlacement, place


def job(colocation=(), **models) -> JobConfig:
    """A job from `name=dict(of model keys)`."""
    return JobConfig(
        path="job.yaml",
        models={name: ModelConfig(name=name, **keys) for name, keys in models.items()},
        runtime=RuntimeConfig(colocation=colocation),
    )


def bundles(plan, model):
    """Bundle indices of a model's ranks."""
    return [rank.bundle for rank in plan.of_model(model)]


def test_colocated_models_share_devices_and_others_have_their_own():
    plan = place(
        job(
            ["policy,policy_trainer"],
            value={"num_gpu": 1},
            policy={"num_gpu": 2},
            policy_trainer={"num_gpu": 2, "trainable": True},
            reference={"num_gpu": 2},
        )
    )
    assert plan.num_bundles == 5
    assert bundles(plan, "value") == [0]
    assert bundles(plan, "policy") == bundles(plan, "policy_trainer") == [1, 2]
    assert bundles(plan, "reference") == [3, 4]
    assert {rank.share for rank in plan.of_model("policy")} == {0.5}
    assert {rank.share for rank in plan.of_model("reference")} == {1.0}


def test_models_of_a_group_start_at_its_first_device_and_share_what_they_cover():
    plan = place(job(["a,b,c"], a={"num_gpu": 1}, b={"num_gpu": 4}, c={"num_gpu": 2}))
    assert plan.num_bundles == 4
    assert bundles(plan, "b") == [0, 1, 2, 3]
    assert [rank.share for rank in plan.of_model("b")] == [1 / 3, 1 / 2, 1.0, 1.0]
    assert [rank.model for rank in plan.on_bundle(1)] == ["b", "c"]


def test_ranks_of_a_replica_are_neighbours():
    parallel = {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2}
    plan = place(job(policy={"num_gpu": 8, **parallel}))
    assert [(rank.replica, rank.rank) for rank in plan.ranks] == [
        (replica, rank) for replica in (0, 1) for rank in (0, 1, 2, 3)
    ]
    assert {rank.world_size for rank in plan.ranks} == {4}
    assert bundles(plan, "policy") == list(range(8))


def test_a_trainable_model_is_one_replica():
    plan = place(job(t={"num_gpu": 4, "trainable": True, "tensor_model_parallel_size": 2}))
    assert [(rank.replica, rank.rank, rank.world_size) for rank in plan.ranks] == [
        (0, 0, 4), (0, 1, 4), (0, 2, 4), (0, 3, 4),
    ]  # fmt: skip


def test_a_model_without_devices_has_one_process_per_share_of_its_cpus():
    plan = place(job(reward={"num_cpu": 4, "cpu_per_process": 2}))
    assert plan.num_bundles == 0
    assert plan.ranks == (
        RankPlacement("reward", 0, 0, 1, None, 0.0, 2),
        RankPlacement("reward", 1, 0, 1, None, 0.0, 2),
    )


def test_models_that_take_no_part_need_no_device():
    whole = job(
        ["policy,trainer,reference"],
        reference={"num_gpu": 4},
        policy={"num_gpu": 2},
        trainer={"num_gpu": 2, "trainable": True},
    )
    plan = place(whole, only={"policy", "trainer"})
    assert plan.num_bundles == 2
    assert bundles(plan, "reference") == []
    assert {rank.share for rank in plan.ranks} == {0.5}


def test_models_lie_on_the_devices_of_their_mapping_and_share_what_both_name():
    plan = place(
        job(
            policy={"num_gpu": 6, "device_mapping": (0, 1, 2, 3, 8, 9)},
            trainer={"num_gpu": 4, "device_mapping": (3, 2, 1, 0), "trainable": True},
            judge={"num_gpu": 1, "device_mapping": (11,)},
            reward={"num_cpu": 1},
        )
    )
    assert plan.devices == (0, 1, 2, 3, 8, 9, 11)
    assert plan.num_bundles == 7  # what no model names is not reserved
    assert bundles(plan, "policy") == [0, 1, 2, 3, 4, 5]
    assert bundles(plan, "trainer") == [3, 2, 1, 0]
    assert [rank.share for rank in plan.of_model("policy")] == [0.5] * 4 + [1.0] * 2
    assert [model for model in ("policy", "trainer", "judge", "reward")
            if plan.shares_devices(model)] == ["policy", "trainer"]  # fmt: skip
    assert plan.describe().splitlines()[4:7] == [
        "3       1/2    3.0     0.0      -",
        "8       1/1    4.0     -        -",
        "9       1/1    5.0     -        -",
    ]


def test_who_shares_devices_depends_on_who_takes_part():
    whole = job(["a,b"], a={"num_gpu": 2}, b={"num_gpu": 1}, c={"num_gpu": 1})
    assert place(whole).shares_devices("a")
    assert not place(whole).shares_devices("c")
    assert not place(whole, only={"a", "c"}).shares_devices("a")


def test_the_plan_can_be_drawn():
    plan = place(
        job(
            ["policy,policy_trainer"],
            policy={"num_gpu": 2},
            reward={"num_cpu": 1},
            policy_trainer={"num_gpu": 3, "trainable": True},
        )
    )
    assert plan.describe().splitlines() == [
        "device  share  policy  policy_trainer",
        "0       1/2    0.0     0.0",
        "1       1/2    1.0     0.1",
        "2       1/1    -       0.2",
        "no device: reward, 1 x 1 CPU",
    ]
