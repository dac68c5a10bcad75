"""Which keys may a job's yaml hold outside the model files, and what does each mean?"""

from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import Field

from chatlearn_vllm.config.model_args import ModelArgs
from chatlearn_vllm.config.section import (
    Count,
    Integers,
    Limit,
    NonNegative,
    Positive,
    Probability,
    Section,
    Strings,
)


class RuntimeEnvConfig(Section):
    """`runtime_env`: what Ray installs or uploads for the workers"""

    pip: Strings = ()
    """Packages that Ray installs for the workers."""
    py_modules: Strings = ()
    """Directories of Python packages that Ray uploads."""
    working_dir: str | None = None
    """Directory that Ray uploads for the workers; None = nothing is uploaded."""
    excludes: Strings = ()
    """Patterns of files in working_dir that are not uploaded, e.g. `*.pt`."""
    platform: str = ""
    """ChatLearn: name of the scheduler that started the cluster. Not read here."""


class LoraConfig(Section):
    """`models.<name>.lora`: low-rank adapters

    ChatLearn's keys; enable_lora must be False, the others do nothing. Adapters are switched on by
    `lora_r` in the model's file.
    """

    no_effect: ClassVar[str] = "adapters are switched on by lora_r in the model's file"

    enable_lora: bool = False
    """Train adapters instead of the weights."""
    part_module_name: str | None = None
    """Only layers whose name contains this."""
    lora_dim: Positive = 8
    """Rank of the adapters."""
    lora_dropout: NonNegative = 0.0
    """Dropout before the adapter."""
    lora_scaling: float = 1.0
    """Factor on the adapter's output."""
    lora_layer: str = (
        "ColumnParallelLinear,Embedding,LinearLayer,RowParallelLinear,VocabParallelEmbedding"
    )
    """Kinds of layers that get an adapter, separated by commas."""
    column_only_qkv: bool = False
    """Of the column parallel layers only the QKV projection."""


class BatchGenerationConfig(Section):
    """`models.<name>.batch_generation`: order of the prompts inside an episode

    ChatLearn's keys; nothing here reads them, vLLM batches continuously.
    """

    no_effect: ClassVar[str] = "vLLM batches continuously, whatever the order of prompts"

    ranking: bool = False
    """Longest prompts first."""
    min_prompt_length: Count = 0
    """Only prompts of at least this many words and CJK characters are ranked."""


class ModelConfig(Section):
    """`models.<name>`: the devices of one model and its file (ChatLearn's module_args)"""

    name: str
    """The key under `models`."""
    num_gpu: Count = 0
    """Devices of all replicas together: GPUs, or CPU cores on a machine without GPUs; 0 = a model
    without devices. With device_mapping it follows from that."""
    device_mapping: Integers | None = None
    """Devices that the model runs on, by their number in the job, rank after rank; models that name
    the same device share it. None = num_gpu devices, shared as runtime.colocation says. Either all
    models with devices have this key or none."""
    num_cpu: Count = 0
    """CPU cores of all processes of a model without devices, e.g. a rule reward."""
    cpu_per_process: Positive = 1
    """CPU cores per process of such a model."""
    gpu_per_process: Positive = 1
    """Devices per process; must be 1."""
    expected_num_replica: Positive | None = Field(default=None, alias="num_replica")
    """Copies of the model. Derived (see `num_gpu`); a value given here must agree."""
    trainable: bool = False
    """Whether the trainer updates it. A trainable model is one replica of all its ranks."""
    tensor_model_parallel_size: Positive = 1
    """Ranks that share each layer; the model file's value wins over this one."""
    pipeline_model_parallel_size: Positive = 1
    """Ranks that share the stack of layers; the model file's value wins over this one."""
    expert_model_parallel_size: Positive = 1
    """Ranks that share the experts; the model file's value wins over this one."""
    zero_size: Positive = 1
    """ChatLearn: ranks of a DeepSpeed group; must be 1, that backend is not here."""
    fsdp_size: Positive = 1
    """ChatLearn: ranks of an FSDP group; must be 1, that backend is not here."""
    sp_size: Positive = 1
    """ChatLearn: ranks of an Ulysses group; must be 1, that backend is not here."""
    model_config_file: str | None = None
    """The model's yaml file, relative to this file."""
    model_args: ModelArgs = ModelArgs()
    """Keys of the model file given in place; they win over the file."""
    generation_batch_size: int | None = None
    """Rows per forward call of a model that scores (reference, reward); None or <= 0 = runtime's
    value. Of the policy it has no effect, vLLM's batch is max_num_seqs."""
    reward_weight: float = 1.0
    """Factor on the rewards of this model, where an engine adds those of several."""
    lora: LoraConfig = LoraConfig()
    """Low-rank adapters."""
    batch_generation: BatchGenerationConfig = BatchGenerationConfig()
    """Order of the prompts."""
    sync_frequency: Limit = 1
    """Episodes between two weight syncs into this model; 0 or -1 = only the first sync. A resumed
    job begins with a sync of the checkpoint's weights."""
    free_memory: bool = False
    """Give device memory back while other models work: sets offload_weights and, for a trainable
    model, free_grad_buffers and offload_optimizer_states."""
    offload_weights: bool = False
    """Move weights to host memory while other models work (vLLM: sleep)."""
    free_grad_buffers: bool = False
    """Free the gradient buffers while other models work."""
    offload_optimizer_states: bool = False
    """Move optimizer states to host memory while other models work."""
    force_free_memory: bool = False
    """Do the above also for a model that shares its devices with no other."""

    @property
    def ranks_per_replica(self) -> int:
        """Processes of one replica; a CPU model has one."""
        if self.num_gpu == 0:
            return 1
        if self.trainable:
            return self.num_gpu
        return self.tensor_model_parallel_size * self.pipeline_model_parallel_size

    @property
    def num_replica(self) -> int:
        """Copies of the model; 1 for a trainable one, whose data parallel ranks are one replica."""
        if self.num_gpu == 0:
            return self.num_cpu // self.cpu_per_process
        return self.num_gpu // self.ranks_per_replica

    @property
    def data_parallel_size(self) -> int:
        """Shards that a training batch is split into."""
        return self.num_gpu // (self.tensor_model_parallel_size * self.pipeline_model_parallel_size)


class MismatchLevels(Section):
    """Levels of the metrics that compare the rollout's log-probabilities with the trainer's."""

    def set_levels(self) -> dict[str, float]:
        """The levels that are not None, by metric."""
        return {name: level for name, level in self if level is not None}


class MismatchWarnConfig(MismatchLevels):
    """`runtime.mismatch_warn`: differences between rollout and trainer that are worth a warning

    A metric above its level is logged, at most once in ten episodes. None = never. Dense models in
    bfloat16 stay below the defaults; mixtures of experts may need higher ones.
    """

    logprob_abs_diff_mean: NonNegative | None = 0.05
    """Mean absolute difference of the log-probabilities of the sampled tokens, in nats."""
    logprob_abs_diff_max: NonNegative | None = None
    """Largest such difference, in nats; single tokens may differ much in bfloat16."""
    rollout_kl: NonNegative | None = 0.01
    """KL divergence from the rollout to the trainer per token, in nats (k3 estimate)."""
    rollout_clip_fraction: NonNegative | None = 0.02
    """Share of tokens whose probability ratio is outside [1 - cliprange, 1 + cliprange] before the
    first optimizer step."""


class MismatchStopConfig(MismatchLevels):
    """`runtime.mismatch_stop`: differences between rollout and trainer that end the job

    The job ends before the optimizer steps of the episode in which a metric is above its level.
    None = never. Log-probabilities that are NaN or infinite always end it.
    """

    logprob_abs_diff_mean: NonNegative | None = None
    """As in `runtime.mismatch_warn`."""
    logprob_abs_diff_max: NonNegative | None = None
    """As in `runtime.mismatch_warn`."""
    rollout_kl: NonNegative | None = None
    """As in `runtime.mismatch_warn`."""
    rollout_clip_fraction: NonNegative | None = None
    """As in `runtime.mismatch_warn`."""


class EpisodeKeys(Section):
    """`runtime`: episodes"""

    entry_script: str | None = None
    """Python script that `chatlearn-vllm launch` runs; relative to this file, then to the current
    directory."""
    num_episode: Positive = 5000
    """Episodes of the job: generate, score, train, sync."""
    sample_per_episode: Positive = 1000
    """Responses per episode: prompts x num_inference_per_prompt x n."""
    generation_batch_size: Positive = 2
    """Rows per forward call of the models that score, unless they have their own."""
    colocation: Strings = ()
    """Groups of models that share devices, each `"a,b,c"`."""
    dynamic_sampling: bool = False
    """Sample further prompts in place of those whose responses all have the same accuracy, or
    reward where the reward module tells no accuracy (DAPO)."""
    max_num_gen_batches: Positive = 10
    """With dynamic_sampling: rollouts of an episode, after which it goes on with what it has."""
    max_rollout_round: Positive = 1
    """Episodes that may work on one response (partial rollouts): with 2 or more an episode ends its
    rollout when enough prompts are answered, and the others go on in the next one; 1 = off."""
    rollout_over_sampling: Probability = 0.5
    """With max_rollout_round > 1: prompts that an episode works on beyond those that it needs, as a
    fraction of these; more than the next episode takes would wait too long."""
    seed: int = 42
    """Seed of the order of prompts."""


class TrainingKeys(Section):
    """`runtime`: training"""

    num_training_epoch: Positive = 1
    """Passes over the samples of an episode."""
    max_relay_episode: Limit = 0
    """Train on the samples of so many episodes, the present one included (replay); 0 and 1 = only
    the present one, -1 = all. The samples keep the advantages of their episode."""
    relay_episode_offset: Count = 0
    """First episode whose samples are kept for that."""
    train_micro_batch_size: Positive = 2
    """Rows per forward and backward pass of one data parallel rank."""
    train_global_batch_size: Positive | None = None
    """Rows per optimizer step, over all data parallel ranks; None = train_micro_batch_size times
    the data parallel size."""
    mismatch_warn: MismatchWarnConfig = MismatchWarnConfig()
    """Levels of the difference between rollout and trainer above which the job warns."""
    mismatch_stop: MismatchStopConfig = MismatchStopConfig()
    """Levels above which it ends."""
    validate_param_sync: bool = True
    """Compare digests of every weight, as sent and as it arrived, in every weight sync."""
    validate_param_sync_stride: Positive = 32
    """Of every weight digest one of so many parts of 64 KiB, another one in each sync; 1 = every
    byte in every sync. The first sync of a job takes every byte whatever this says."""


class DataKeys(Section):
    """`runtime`: data and evaluation

    Paths are relative to the directory in which the job is started.
    """

    data_path: str | Strings | None = None
    """jsonl file of training prompts, or a list of them."""
    eval_data_path: str | Strings | None = None
    """jsonl file of evaluation prompts, or a list of them."""
    training_data_num_limit: Limit = -1
    """Use only the first training prompts; -1 = all."""
    eval_data_num_limit: Limit = 128
    """Use only the first evaluation prompts; -1 = all."""
    data_shuffle: bool = True
    """Draw prompts in a new random order in every pass over the data."""
    consumed_samples: Count = 0
    """Samples that an earlier job already took from the data: start behind them."""
    eval_episode_interval: Count = 0
    """Episodes between two evaluations; 0 = none."""
    enable_eval_before_training: bool = False
    """Also evaluate before the first episode; not where a job goes on from a checkpoint."""


class OutputKeys(Section):
    """`runtime`: output and resume"""

    output_dir: str = "./"
    """Directory for metrics, logs and checkpoints."""
    exp_name: str = "CHATLEARN"
    """Name of the experiment; a directory of this name is made in output_dir."""
    log_interval: Positive = 1
    """Episodes between two lines of metrics."""
    save_episode_interval: Positive | None = None
    """Episodes between two checkpoints; None = none."""
    enable_resume_training: bool = True
    """Go on from the newest checkpoint of this experiment, if there is one; if it is that of the
    last episode, nothing is started."""
    data_checkpoint_path: str | None = None
    """Directory of the position in the data, with exp_name appended if it is not in it; None = with
    the checkpoints."""
    async_save: bool = False
    """Copy a checkpoint to host memory and write it while the job goes on; it counts when all ranks
    have written it. Needs host memory for a trainer's weights and optimizer once more."""
    max_ckpt_to_keep: Positive | None = None
    """Keep only this many newest checkpoints, trainers' files and positions in the data together,
    and the one that the run was resumed from; older ones go when a newer one is complete. None =
    all."""
    max_data_ckpt_nums: Positive | None = None
    """Keep only this many newest positions; None = all."""
    load_data_checkpoint_iteration: Positive | None = None
    """Resume from the position of this iteration; None = the newest."""


class UnusedRuntimeKeys(Section):
    """`runtime`: keys of ChatLearn that nothing here reads

    Accepted so that files made for ChatLearn load; one notice at start names those that are set.
    """

    no_effect: ClassVar[str] = "nothing in this version reads them"

    debug: bool = False
    """More output."""
    query_key: str = "query"
    """Field of a prompt record that holds a question; here always `query`."""
    mini_data: str | None = None
    """File of a few prompts."""
    stream_data_loader_type: Literal["fixed", "dynamic"] = "fixed"
    """How samples are queued for the trainer."""
    max_iteration_per_sample: Positive = 1
    """Iterations that one sample may take."""
    training_shuffle_mode: Literal["batch", "sample"] = "batch"
    """Unit of shuffling between training epochs."""
    data_ratio: int | Integers | None = None
    """Shares of several data files."""
    data_rerank: bool = False
    """Spread the copies of a prompt over the batch."""
    concurrent_setup: bool = False
    """Set models up at the same time."""
    cpu_schedule_strategy: Literal["PACK", "SPREAD"] = "SPREAD"
    """How Ray places CPU models on nodes."""
    bucket_size_mb_in_memory_manager: Positive = 1024
    """MB per offload bucket."""
    coalesce_param: bool = True
    """Weight sync: send parameters in buckets."""
    coalesced_buffer_mb: Positive = 100
    """Weight sync: MB per bucket."""
    concurrent_comm: bool = True
    """Weight sync: one thread per sender."""
    param_sync_comm_type: Literal["broadcast", "p2p"] = "broadcast"
    """Weight sync: collective used."""
    param_sync_max_workers: Limit | None = None
    """Weight sync: number of threads."""
    free_sync_collective_group: bool = False
    """Weight sync: drop communicators afterwards."""
    routed_expert_regrouping_comm_type: Literal["allgather", "alltoall"] = "alltoall"
    """Weight sync: how experts are regrouped."""
    policy_to_regroup_queue: str = "global_barrier"
    """When scoring models start on the responses."""
    nsys: bool = False
    """Run under Nsight Systems."""
    profiler_dir: str | None = None
    """Directory for torch profiler traces."""
    log_config_file: str = ""
    """yaml file of the metric loggers."""
    log_args_dict: dict[str, Any] | None = None
    """Settings of the metric loggers."""


class RuntimeConfig(EpisodeKeys, TrainingKeys, DataKeys, OutputKeys, UnusedRuntimeKeys):
    """The episode loop (ChatLearn's runtime_args)."""

    @property
    def run_dir(self) -> Path:
        """Where this experiment writes: output_dir, with exp_name appended if it is not in it."""
        output_dir = Path(self.output_dir)
        return output_dir if self.exp_name in output_dir.parts else output_dir / self.exp_name

    def colocation_groups(self) -> tuple[tuple[str, ...], ...]:
        """`colocation` as groups of model names."""
        return tuple(
            tuple(name.strip() for name in group.split(",") if name.strip())
            for group in self.colocation
        )

    def get(self, key: str, default: Any = None) -> Any:
        """Value of a key by name, `default` where there is no such key."""
        return getattr(self, key) if key in type(self).model_fields else default


class JobConfig(Section):
    """A whole job, checked."""

    path: str
    """The yaml file it came from."""
    runtime_env: RuntimeEnvConfig = RuntimeEnvConfig()
    models: dict[str, ModelConfig] = {}
    """By name, in the order of the file."""
    runtime: RuntimeConfig = RuntimeConfig()
    notices: tuple[str, ...] = ()
    """What the user should know before the job starts; the launcher logs each once."""

    @property
    def entry_script(self) -> Path | None:
        """`runtime.entry_script` beside the job's yaml, else in the current directory; None where
        there is no such file."""
        name = self.runtime.entry_script
        places = [Path(self.path).parent / name, Path(name)] if name else []
        return next((place.resolve() for place in places if place.is_file()), None)
