"""How do files, includes, the environment and the command line become one job?"""

import pickle
from collections.abc import Mapping

import pytest

from chatlearn_vllm.config import ConfigError, load_config


def test_values_come_typed_from_both_files(job):
    loaded = load_config(job)
    assert loaded.path == str(job)
    assert list(loaded.models) == ["policy", "reward", "policy_trainer"]
    assert loaded.models["policy"].name == "policy"
    assert loaded.models["policy"].model_args.seq_length == 64
    assert loaded.runtime.sample_per_episode == 16
    assert loaded.notices == ()


def test_own_keys_win_and_later_includes_win_and_maps_merge(write):
    write("a.yaml", "runtime: {num_episode: 1, log_interval: 1, exp_name: a}\n")
    write("b.yaml", "runtime: {num_episode: 2, log_interval: 2}\n")
    path = write(
        "job.yaml",
        "includes: [a.yaml, b.yaml]\nmodels: {m: {num_cpu: 1}}\nruntime: {num_episode: 3}\n",
    )
    runtime = load_config(path).runtime
    assert (runtime.num_episode, runtime.log_interval, runtime.exp_name) == (3, 2, "a")


def test_includes_are_beside_the_including_file_else_beside_the_job(write):
    write("shared/near.yaml", "seed: 1\n")
    write("near.yaml", "seed: 2\n")
    write("far.yaml", "lr: 1e-5\n")
    write("shared/model.yaml", "includes: [near.yaml, far.yaml]\n")
    path = write("job.yaml", "models: {m: {num_gpu: 1, model_config_file: shared/model.yaml}}\n")
    args = load_config(path).models["m"].model_args
    assert (args.seed, args.lr) == (1, 1e-5)


def test_includes_in_a_circle_are_refused(write):
    write("a.yaml", "includes: [job.yaml]\n")
    path = write("job.yaml", "includes: [a.yaml]\nmodels: {m: {num_cpu: 1}}\n")
    with pytest.raises(ConfigError, match=r"a\.yaml: includes='job\.yaml': .* in a circle"):
        load_config(path)


def test_the_environment_fills_values_also_in_lists(write, monkeypatch):
    monkeypatch.setenv("OTHER", "b")
    monkeypatch.delenv("UNSET", raising=False)
    path = write(
        "job.yaml",
        "models: {a: {num_gpu: '${UNSET:2}'}, b: {num_gpu: 2}}\n"
        "runtime: {colocation: ['${UNSET:a},${OTHER}'], output_dir: 's3://${OTHER}:1/x'}\n",
    )
    loaded = load_config(path)
    assert loaded.models["a"].num_gpu == 2
    assert loaded.runtime.colocation_groups() == (("a", "b"),)
    assert loaded.runtime.output_dir == "s3://b:1/x"


def test_model_keys_in_place_win_over_the_model_file(job, write):
    write(
        "job.yaml",
        "models: {policy: {num_gpu: 1, model_config_file: policy.yaml,"
        " model_args: {max_new_tokens: 8}}}\n",
    )
    args = load_config(job).models["policy"].model_args
    assert (args.seq_length, args.max_new_tokens) == (64, 8)


def test_the_command_line_wins_over_every_file(job, write):
    write("policy.yaml", "tensor_model_parallel_size: 2\n")
    overrides = [
        "runtime.num_episode=3",
        "models.policy.model_args.temperature=0.7",
        "models.policy.tensor_model_parallel_size=1",
        "runtime.exp_name=a=b",
        "runtime.colocation=['policy,policy_trainer']",
    ]
    loaded = load_config(job, overrides)
    assert loaded.runtime.num_episode == 3
    assert loaded.runtime.exp_name == "a=b"
    assert loaded.runtime.colocation == ("policy,policy_trainer",)
    assert loaded.models["policy"].model_args.temperature == 0.7
    assert loaded.models["policy"].model_args.tensor_model_parallel_size == 1
    assert loaded.models["policy"].num_replica == 2


def test_parallel_sizes_of_the_model_file_win_over_the_job_file(write):
    write("m.yaml", "tensor_model_parallel_size: 2\n")
    path = write(
        "job.yaml",
        "models:\n  m: {num_gpu: 4, tensor_model_parallel_size: 4,"
        " pipeline_model_parallel_size: 2, model_config_file: m.yaml}\n",
    )
    model = load_config(path).models["m"]
    assert (model.tensor_model_parallel_size, model.pipeline_model_parallel_size) == (2, 2)
    assert model.model_args.pipeline_model_parallel_size == 2


def test_replicas_follow_from_devices(job):
    models = load_config(job, ["models.reward.num_cpu=3"]).models
    assert (models["policy"].num_replica, models["policy"].ranks_per_replica) == (2, 1)
    assert (models["reward"].num_replica, models["reward"].ranks_per_replica) == (3, 1)
    trainer = models["policy_trainer"]
    assert (trainer.num_replica, trainer.ranks_per_replica) == (1, 2)
    assert trainer.data_parallel_size == 2


def test_free_memory_stands_for_its_parts(job):
    models = load_config(
        job, ["models.policy.free_memory=True", "models.policy_trainer.free_memory=True"]
    ).models
    policy, trainer = models["policy"], models["policy_trainer"]
    assert (policy.offload_weights, policy.free_grad_buffers) == (True, False)
    assert trainer.offload_weights and trainer.free_grad_buffers
    assert trainer.offload_optimizer_states


def test_values_that_follow_from_others_are_filled_in(job, write):
    write("policy.yaml", "load: /some/where\nbf16: True\n")
    loaded = load_config(
        job,
        [
            "runtime.train_global_batch_size=None",
            "runtime.generation_batch_size=5",
            "models.reward.generation_batch_size=3",
            "models.policy.generation_batch_size=-1",
        ],
    )
    policy = loaded.models["policy"]
    assert policy.model_args.tokenizer == policy.model_args["tokenizer"] == "/some/where"
    assert policy.model_args.dtype == "bfloat16"
    assert policy.generation_batch_size == 5
    assert loaded.models["reward"].generation_batch_size == 3
    assert loaded.runtime.train_global_batch_size == 4  # micro batch 2 x 2 trainer ranks


def test_generation_batch_size_is_not_the_number_of_sequences_of_vllm(job):
    args = load_config(job, ["models.policy.generation_batch_size=4"]).models["policy"].model_args
    assert args.max_num_seqs == 256


@pytest.mark.parametrize(
    ("text", "dtype"),
    [("", "auto"), ("bf16: null\n", "auto"), ("bf16: True\n", "bfloat16"),
     ("fp16: True\n", "float16"),
     ("bf16: False\n", "float32"), ("bf16: False\nfp16: True\n", "float16"),
     ("bf16: False\ndtype: float16\n", "float16")],
)  # fmt: skip
def test_flags_of_megatron_say_the_type(job, write, text, dtype):
    write("policy.yaml", text or "seed: 1\n")
    assert load_config(job).models["policy"].model_args.dtype == dtype


def test_keys_of_upstream_libraries_pass_through_by_library(job, write):
    write(
        "policy.yaml",
        "enable_chunked_prefill: True\nmin_tokens: 3\nlayernorm_epsilon: 1e-6\nseed: 7\n",
    )
    args = load_config(job).models["policy"].model_args
    assert args.engine_args == {"enable_chunked_prefill": True}
    assert args.sampling_args == {"min_tokens": 3}
    assert args.transformer_args == {"layernorm_epsilon": 1e-6}


def test_model_args_are_also_a_mapping(job, write):
    write("policy.yaml", "min_tokens: 3\nuser_args: {mine: [1]}\n")
    args = load_config(job).models["policy"].model_args
    assert isinstance(args, Mapping)
    assert args["seq_length"] == args.seq_length == args.get("seq_length") == 1024
    assert args["min_tokens"] == 3
    assert args.user_args["mine"] == [1]
    assert args.get("nothing") is None and "nothing" not in args
    assert dict(args)["max_num_seqs"] == 256
    assert {"lr", "min_tokens"} <= set(args) == set(args.keys()) == {key for key, _ in args.items()}
    with pytest.raises(KeyError):
        args["nothing"]


def test_a_job_is_frozen_and_travels_between_processes(job):
    loaded = load_config(job)
    assert pickle.loads(pickle.dumps(loaded)) == loaded
    with pytest.raises(ValueError, match="frozen"):
        loaded.runtime.num_episode = 3


def test_legacy_keys_are_renamed_and_named_once(write):
    write("m.yaml", "vllm_load_format: auto\ndecoder_first_pipeline_num_layers: 3\n")
    path = write(
        "job.yaml",
        "rlhf: {num_episode: 7}\nmodels: {m: {num_device: 2, model_config_file: m.yaml}}\n",
    )
    loaded = load_config(path, ["rlhf.log_interval=2", "models.m.num_device=4"])
    assert (loaded.runtime.num_episode, loaded.runtime.log_interval) == (7, 2)
    assert loaded.models["m"].num_gpu == 4
    assert loaded.models["m"].model_args.load_format == "auto"
    assert loaded.models["m"].model_args.num_layers_in_first_pipeline_stage == 3
    assert f"{path}: rlhf is now called runtime" in loaded.notices


def test_a_legacy_key_beside_its_new_name_is_refused(write):
    path = write("job.yaml", "models: {m: {num_device: 2, num_gpu: 4}}\n")
    with pytest.raises(ConfigError, match="num_device=2: is the older name of num_gpu"):
        load_config(path)


def test_keys_without_effect_are_accepted_and_named_once(job, write):
    write("policy.yaml", "max_paddings: 512\nswap_space: 4\nsliding_window: None\nlm_coef: 0.9\n")
    notices = load_config(job, ["runtime.nsys=True", "runtime.coalesce_param=True"]).notices
    assert notices == (
        "runtime: no effect of nsys=True; nothing in this version reads them",
        "models.policy: no effect of lm_coef=0.9; no built-in module reads them",
        "models.policy: no effect of max_paddings=512, swap_space=4.0; "
        "vLLM's V1 engine has no such setting",
    )


@pytest.mark.parametrize(
    "setting", ["top_p=0.9", "top_k=50", "min_p=0.1", "repetition_penalty=1.1"]
)
def test_a_changed_sampling_distribution_is_pointed_out(job, setting):
    (notice,) = load_config(job, [f"models.policy.model_args.{setting}"]).notices
    assert notice.startswith(f"models.policy: {setting} ")
    assert "ratio will be biased" in notice


@pytest.mark.parametrize("setting", ["top_k=0", "temperature=0.7", "eval_top_p=0.5"])
def test_sampling_that_keeps_the_distribution_is_not_pointed_out(job, setting):
    assert load_config(job, [f"models.policy.model_args.{setting}"]).notices == ()


def test_run_dir_holds_the_name_of_the_experiment_once(job):
    for output_dir in ("out", "out/exp"):
        overrides = [f"runtime.output_dir={output_dir}", "runtime.exp_name=exp"]
        assert load_config(job, overrides).runtime.run_dir.as_posix() == "out/exp"


@pytest.mark.parametrize("key", ["load_format", "quantization"])
def test_a_name_that_a_plugin_of_vllm_brings_is_passed_on(job, tmp_path, monkeypatch, key) -> None:
    setting = f"models.policy.model_args.{key}=my_own"
    with pytest.raises(ConfigError) as refusal:
        load_config(job, [setting])
    assert f"{key}='my_own': must be one of vLLM's: " in str(refusal.value)
    assert "; no plugin of vLLM is installed here that could add to them" in str(refusal.value)
    plugin = tmp_path / "site" / "my_plugin-1.0.dist-info"
    plugin.mkdir(parents=True)
    (plugin / "METADATA").write_text("Metadata-Version: 2.1\nName: my_plugin\nVersion: 1.0\n")
    (plugin / "entry_points.txt").write_text("[vllm.general_plugins]\nmine = my_plugin:register\n")
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    loaded = load_config(job, [setting])
    assert getattr(loaded.models["policy"].model_args, key) == "my_own"


@pytest.mark.parametrize("schedule", ["{}", "{lr_decay_style: linear, lr_decay_iters: 100000}"])
def test_a_warm_up_that_the_job_does_not_finish_is_told(job, schedule):
    trainer = "models.policy_trainer.model_args"
    overrides = [f"{trainer}={schedule}", f"{trainer}.lr=1e-5"]
    assert load_config(job, [*overrides, f"{trainer}.lr_warmup_iters=10000"]).notices == ()
    (notice,) = load_config(job, [*overrides, f"{trainer}.lr_warmup_iters=10001"]).notices
    assert notice == (
        "models.policy_trainer: lr_warmup_iters=10001 is more than the 10000 optimizer steps of "
        "the job, which never reaches lr=1e-05"
    )
