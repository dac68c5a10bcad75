"""Which keys may a model's yaml file hold, and what does each mean?

The keys lie flat in the file; the classes below only group them for the reader and for
docs/configuration.md. Names are ChatLearn's, which are Megatron's and vLLM's.
"""

from collections.abc import Iterator, Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field, SecretStr, field_validator

from chatlearn_vllm.config.accepted_args import (
    LoggingArgs,
    MegatronArgs,
    RetiredArgs,
    UnusedArgs,
)
from chatlearn_vllm.config.section import (
    Count,
    Limit,
    NonNegative,
    Positive,
    Probability,
    Section,
    Seed,
    Share,
    Strings,
    list_to_tuple,
)

DTYPE_OF_FLAG = {"bf16": "bfloat16", "fp16": "float16"}
_DTYPE_OF_NAME = {"half": "float16", "float": "float32"}
"""Further names that vLLM has for them."""


def _lower(value: Any) -> Any:
    """A name of vLLM's without regard to capitals; none where it is empty."""
    return (value.lower() or None) if isinstance(value, str) else value


class WeightArgs(Section):
    """Weights, tokenizer and lengths"""

    load: str | None = None
    """Directory in Hugging Face form: config.json, tokenizer and weights; without weights in it,
    training starts from random ones."""
    tokenizer: str | None = None
    """Directory of the tokenizer, in Hugging Face form. None: that of `load`."""
    save: str | None = None
    """Directory of checkpoints for resuming; None = `checkpoints/<model>` in the run directory."""
    seed: Seed = 42
    """Seed of initial weights and sampling; replicas and samples derive their own."""
    seq_length: Positive = 1024
    """Longest sequence in tokens: prompt and response together (vLLM's max_model_len)."""
    max_new_tokens: Positive = 512
    """Longest response in tokens; prompts are cut to seq_length - max_new_tokens."""
    dtype: Annotated[
        Literal["auto", "bfloat16", "float16", "float32"],
        BeforeValidator(
            lambda name: _DTYPE_OF_NAME.get(name, name) if isinstance(name, str) else name
        ),
    ] = "auto"
    """Type of the weights. auto: bfloat16 on GPUs, float32 on CPUs. half is vLLM's name of float16,
    float of float32. On CPUs vLLM works in float32 whatever is said here."""
    bf16: bool | None = None
    """Megatron's spelling of `dtype: bfloat16`; False and no fp16: float32."""
    fp16: bool | None = None
    """Megatron's spelling of `dtype: float16`."""


class ShapeArgs(Section):
    """Model structure

    Read from `load`/config.json; a key given here as well must agree with it.
    """

    num_layers: Positive | None = None
    """Transformer layers."""
    hidden_size: Positive | None = None
    """Width of the residual stream."""
    num_attention_heads: Positive | None = None
    """Query heads; a multiple of tensor_model_parallel_size."""
    num_query_groups: Positive | None = None
    """Key/value heads; a multiple or a divisor of tensor_model_parallel_size."""
    ffn_hidden_size: Positive | None = None
    """Width of the feed-forward layer."""


class ParallelArgs(Section):
    """Parallelism"""

    tensor_model_parallel_size: Positive = 1
    """Ranks that share each layer."""
    pipeline_model_parallel_size: Positive = 1
    """Ranks that share the stack of layers."""
    virtual_pipeline_model_parallel_size: Positive | None = None
    """Chunks of layers per pipeline rank (interleaved schedule); needs pipeline parallel > 1."""
    expert_model_parallel_size: Positive = 1
    """Ranks that share the experts of a mixture-of-experts model."""
    expert_tensor_parallel_size: Positive | None = None
    """Ranks that share each expert; None = tensor_model_parallel_size. The number of ranks must be
    a multiple of this x expert_model_parallel_size x pipeline_model_parallel_size."""
    enable_expert_parallel: bool = False
    """vLLM: a tensor parallel rank holds some experts whole, not a slice of each."""
    num_layers_in_first_pipeline_stage: Positive | None = None
    """Layers of the first pipeline stage of a Megatron model; None = as many as the others."""
    num_layers_in_last_pipeline_stage: Positive | None = None
    """Layers of the last pipeline stage of a Megatron model; None = as many as the others."""
    sequence_parallel: bool = False
    """Split activations between the tensor parallel regions along the sequence; no effect with
    TP 1, always on for a mixture-of-experts model with TP > 1."""
    use_distributed_optimizer: bool = True
    """Shard optimizer states over the data parallel ranks."""
    overlap_grad_reduce: bool = False
    """Reduce gradients while the backward pass still runs."""
    overlap_param_gather: bool = False
    """Gather updated parameters while the next forward pass runs."""
    distributed_timeout_minutes: Positive = 10
    """A collective call that waits longer than this many minutes fails."""


class MicroBatchArgs(Section):
    """Micro-batches (Megatron models)"""

    max_tokens_per_micro_batch: Positive | None = None
    """Most tokens, padding included, that one forward (and backward) pass of one rank takes, at
    least seq_length, for training on pairs twice that: rows of similar lengths go together, as many
    as fit. It replaces train_micro_batch_size and generation_batch_size; None = these numbers of
    rows."""
    sequence_packing: bool = False
    """Put the rows of a micro-batch behind each other instead of padding them to the longest; no
    token sees those of another row."""


class OptimizerArgs(Section):
    """Optimizer and schedule (trainable models)"""

    lr: NonNegative = 1e-6
    """Peak learning rate of Adam."""
    min_lr: NonNegative = 0.0
    """Learning rate at the end of the decay."""
    lr_decay_style: Literal["constant", "linear", "cosine"] = "constant"
    """Shape of the learning rate after the warm-up."""
    lr_warmup_iters: Count = 0
    """Optimizer steps over which the learning rate rises from 0."""
    lr_decay_iters: Positive | None = None
    """Optimizer steps until min_lr is reached; None = all steps of the job, in Online DPO as many
    as if every prompt gave a pair."""
    weight_decay: NonNegative = 0.01
    """Decoupled weight decay."""
    clip_grad: NonNegative = 1.0
    """Gradient norm above which gradients are scaled down; 0 = never."""
    adam_beta1: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """Decay of Adam's first moment."""
    adam_beta2: Annotated[float, Field(ge=0, lt=1)] = 0.999
    """Decay of Adam's second moment."""
    adam_eps: Annotated[float, Field(gt=0)] = 1e-8
    """Term that keeps Adam's denominator away from 0."""
    recompute_granularity: Literal["full", "selective"] | None = None
    """Activations computed again in the backward pass: whole layers (full) or attention."""
    recompute_activations: bool = False
    """Megatron's spelling of `recompute_granularity: selective`."""
    recompute_method: Literal["uniform", "block"] | None = None
    """How `recompute_granularity: full` picks layers."""
    recompute_num_layers: Positive | None = None
    """Layers per recomputed unit (uniform) or recomputed layers per stage (block)."""


class LoraArgs(Section):
    """Low-rank adapters (trainable models)

    With lora_r > 0 the weights stay as they are and an adapter beside each layer of
    target_modules is trained; weight sync and save_hf merge it.
    """

    lora_r: Count = 0
    """Rank of the adapters; 0 = train the weights themselves."""
    lora_alpha: Annotated[float, Field(gt=0)] = 16.0
    """The adapter's output is multiplied by lora_alpha / lora_r."""
    lora_dropout: NonNegative = 0.0
    """Must be 0: with dropout the trainer would not score tokens as the rollout sampled them."""
    target_modules: Annotated[
        tuple[Literal["linear_qkv", "linear_proj", "linear_fc1", "linear_fc2"], ...],
        BeforeValidator(list_to_tuple),
        Field(min_length=1),
    ] = ("linear_qkv", "linear_proj", "linear_fc1", "linear_fc2")
    """Megatron names of the layers that get one: of attention (qkv, proj) and MLP (fc1, fc2)."""


class AlgorithmArgs(Section):
    """Policy optimisation (the trainable policy, and PPO's trainable value model)

    Of keys that the job's algorithm does not read (`lam` in GRPO), those that a file sets to
    another value than the default are told when the engine is made.
    """

    cliprange: NonNegative = 0.2
    """The probability ratio is clipped to [1 - cliprange, 1 + cliprange]."""
    cliprange_high: NonNegative | None = None
    """The distance above 1, where it should differ (DAPO's clip-higher); None = cliprange."""
    dual_clip: Annotated[float, Field(gt=1)] | None = None
    """Ratio above which a negative advantage counts no more; None = no such bound."""
    ratio_level: Literal["token", "sequence"] = "token"
    """Whose probability the ratio compares; sequence, with loss_agg: seq-mean and a cliprange of
    3e-4, is GSPO."""
    tis_imp_ratio_cap: Annotated[float, Field(ge=1)] | None = None
    """Weigh tokens by trainer over rollout probability, at most this (truncated importance
    sampling); None = no weights."""
    advantage_estimator: Literal["grpo", "rloo", "reinforce++"] = "grpo"
    """GRPOEngine: compare a response with its group's mean, with the mean of the others in its
    group, or spread its return over its tokens and whiten over the episode."""
    advantage_std: bool = True
    """grpo: divide by the standard deviation of the group, too; False is Dr. GRPO's choice."""
    init_kl_coef: NonNegative = 0.0
    """Weight of the KL penalty towards the reference model; 0 = no reference model needed."""
    kl_estimator: Literal["k1", "k2", "k3"] = "k3"
    """GRPOEngine: estimator of that KL in the loss: log ratio (its gradient is 0 on average), half
    its square, or the unbiased non-negative one. In rewards (PPO, reinforce++) it is k1."""
    fix_kl_coef: bool = True
    """PPO: keep init_kl_coef; False lets it follow `target`."""
    target: Annotated[float, Field(gt=0)] = 6.0
    """PPO: KL per response, in nats, that an adaptive coefficient holds."""
    horizon: Positive = 10000
    """PPO: samples over which an adaptive coefficient reacts."""
    loss_agg: Literal["token-mean", "seq-mean", "seq-mean-token-sum-norm"] = "token-mean"
    """Mean over all response tokens; mean over responses of each response's mean; or mean over
    responses of its sum divided by max_new_tokens (Dr. GRPO)."""
    entropy_coef: NonNegative = 0.0
    """Weight of the entropy bonus."""
    gamma: Share = 1.0
    """PPO, reinforce++: discount per token."""
    lam: Probability = 0.95
    """PPO: lambda of generalised advantage estimation."""
    cliprange_value: Annotated[float, Field(gt=0)] | None = 0.1
    """PPO: values may move so far from those before the update; None = any distance."""
    cliprange_reward: Annotated[float, Field(gt=0)] = 100.0
    """PPO, reinforce++: rewards are clipped to plus and minus this."""
    overlong_buffer_len: Positive | None = None
    """Tokens before max_new_tokens over which a penalty on length grows (DAPO); None = none."""
    overlong_penalty_factor: NonNegative = 1.0
    """Reward that a response of max_new_tokens loses to that penalty."""
    dpo_weight: Annotated[float, Field(gt=0)] = 0.1
    """DPO: beta, the strength of the tie to the reference model."""
    use_ipo: bool = False
    """DPO: take IPO's loss."""
    label_smoothing: Annotated[float, Field(ge=0, lt=0.5)] = 0.0
    """DPO: probability that a pair is the wrong way round."""


class PromptArgs(Section):
    """Prompts"""

    prompt_key: str = "prompt"
    """Field of a prompt record that holds the prompt."""
    num_inference_per_prompt: Positive = 1
    """Responses per prompt in training, the size of GRPO's group. Evaluation takes one."""


TopP = Annotated[Share, BeforeValidator(lambda value: 1.0 if value == 0 else value)]
"""Megatron's generation writes 0 where vLLM has 1: no limit."""


class SamplingArgs(Section):
    """Sampling

    Any other field of vLLM's SamplingParams may be given under its own name: min_tokens,
    stop_token_ids, logit_bias, structured_outputs (a map: `{regex: "[0-9]+"}`), ... They apply to
    training and evaluation.
    """

    n: Positive = 1
    """Responses per request; multiplies num_inference_per_prompt."""
    temperature: NonNegative = 1.0
    """Logits are divided by it before sampling; 0 = greedy, for one response per prompt."""
    top_p: TopP = 1.0
    """Sample from the most probable tokens whose probabilities sum to this; 1 or 0 = all."""
    top_k: Limit = -1
    """Sample from this many most probable tokens; -1 or 0 = all."""
    min_p: Probability = 0.0
    """Drop tokens less probable than this share of the most probable one."""
    presence_penalty: float = 0.0
    """Subtracted from the logit of every token already generated."""
    frequency_penalty: float = 0.0
    """Subtracted once for each time a token was generated."""
    repetition_penalty: Annotated[float, Field(gt=0)] = 1.0
    """Factor on the logits of tokens in the prompt or response; 1 = none."""
    eval_temperature: NonNegative = 1.0
    """`temperature` of evaluation."""
    eval_top_p: TopP = 1.0
    """`top_p` of evaluation."""
    eval_top_k: Limit = -1
    """`top_k` of evaluation."""
    eval_min_p: Probability = 0.0
    """`min_p` of evaluation."""
    eval_presence_penalty: float = 0.0
    """`presence_penalty` of evaluation."""
    eval_frequency_penalty: float = 0.0
    """`frequency_penalty` of evaluation."""
    eval_repetition_penalty: Annotated[float, Field(gt=0)] = 1.0
    """`repetition_penalty` of evaluation."""
    num_beams: Positive = 1
    """More than 1: search the most probable responses with so many beams, instead of sampling;
    num_inference_per_prompt x n of them are returned. temperature, top_p, top_k and min_p have no
    effect then. A beam has no sampling probability: policies that are trained on that of their
    responses cannot use it, those trained on preferences (Online DPO) can. docs/beam_search.md."""
    use_beam_search: bool = False
    """Older spelling: True with num_beams: 1 searches as many beams as responses are returned.
    Evaluations search with eval_num_beams only."""
    length_penalty: float = 1.0
    """Beams are compared by log-probability / length ** length_penalty."""
    eval_num_beams: Positive = 1
    """`num_beams` of evaluation, which takes the best beam."""
    ignore_eos: bool = False
    """Go on after the end-of-sequence token, until the length limit."""
    stop_token_list: str | None = None
    """Strings that end a response, separated by semicolons, e.g. `<|im_end|>;###`. One that is a
    special token ends it as a token, as `stop_token_ids` do, the others where the text has them."""
    new_token_limit: bool = True
    """True: at most max_new_tokens per response. False: up to seq_length."""
    prompt_logprobs: Count | None = None
    """1 = also return the log probability of each prompt token; None = do not (less memory)."""
    skip_special_tokens: bool = True
    """Leave special tokens out of the text of a response."""
    seed_per_response: bool | None = None
    """Draw every response with a seed of its own, so that it does not depend on what else is being
    generated. False: one seed per rollout, which is faster where vLLM's older model runner draws
    the tokens of a step one after the other then. None = True on CPUs, False on GPUs and with
    drafts that are drawn (draft_sample_method: probabilistic)."""
    apply_replica_id_to_seed: bool = True
    """Give every replica its own seed. Must be True: equal seeds give equal samples."""


class SchedulerArgs(Section):
    """vLLM scheduler, cache and engine

    Any other field of vLLM's EngineArgs may be given under its own name: kv_cache_memory_bytes,
    revision, tokenizer_revision, tokenizer_mode, trust_remote_code, ...
    """

    inference_engine: Literal["vllm", "transformers", "server"] = "vllm"
    """What generates: vLLM in the ranks' processes, Hugging Face Transformers in the same place
    (one rank per replica), or a vLLM server elsewhere."""
    attn_implementation: Literal["sdpa", "eager", "flash_attention_2"] = "sdpa"
    """Attention of `inference_engine: transformers`; for vLLM's see attention_backend."""
    max_num_seqs: Positive = 256
    """Sequences that one replica decodes at the same time."""
    max_num_batched_tokens: Positive | None = None
    """Tokens of one scheduler step, at least max_num_seqs; None = vLLM's choice."""
    block_size: Positive | None = None
    """Tokens (not MB) per block of the KV cache; None = the backend's choice, 16 on most GPUs."""
    gpu_memory_utilization: Share = 0.5
    """Share of a GPU's total memory for weights and KV cache; the trainer needs the rest. With
    vLLM 0.25 CUDA graphs and the sampler's state are beyond it: 4 bytes x max_num_seqs x vocabulary
    and some more, 0.6 GB with 1,024 sequences and 152,000 tokens."""
    enforce_eager: bool = False
    """Run without compilation and CUDA graphs. Graphs are made for steps of up to 1024 tokens,
    where `max_num_seqs` allows so many."""
    enable_prefix_caching: bool = True
    """Keep the KV cache of common prompt beginnings; emptied when the weights change."""
    load_format: str = "dummy"
    """First weights: dummy (they come with the first weight sync), or vLLM's auto, safetensors."""
    sleep_level: Literal[1, 2] = 2
    """While others use the GPU: 1 keeps the weights in host memory, 2 drops them."""
    weight_sync_path: Literal["auto", "direct", "load_weights"] = "auto"
    """How new weights enter the engine. direct: copied into its parameters. load_weights: whole
    tensors through vLLM's loader, which quantises them again. auto: direct where possible."""
    quantization: Annotated[str | None, BeforeValidator(_lower)] = None
    """fp8: vLLM quantises weights as they come, again at each weight sync. awq, gptq, or another of
    vLLM's names: how the checkpoint in `load` is quantised, for models that no trainer sends
    weights to; docs/engines.md."""
    log_metrics: bool = False
    """Log the engine's own counters (running requests, cache use) while it generates."""


def _servers(given: Any) -> Any:
    """One server or several as a list of them."""
    if given is not None and (not isinstance(given, str | list | tuple) or not given):
        raise ValueError("must be the URL of a server, a list of URLs, or `start`")
    return (given,) if isinstance(given, str) else given


def _api_key(given: Any) -> Any:
    """A key that looks like a number is text, too."""
    if isinstance(given, str | int | float) and not isinstance(given, bool):
        given = str(given)
    if given is not None and not (isinstance(given, str) and given.isprintable() and given.strip()):
        raise ValueError("must be text on one line")
    return given


class ServerArgs(Section):
    """vLLM servers

    The rollout engine is a vLLM server, here or elsewhere, that is called over HTTP; the role needs
    no device then (num_cpu: 1 for each server). docs/server.md.
    """

    vllm_server: Annotated[Strings | None, BeforeValidator(_servers)] = None
    """URL of the server, `http://HOST:PORT`; a list of them for as many replicas; `start`: the job
    starts one for each replica, on its devices."""
    vllm_server_api_key: Annotated[
        SecretStr | None,
        BeforeValidator(_api_key),
    ] = None
    """Key that the server was started with, best as ${VLLM_API_KEY}; never shown. Servers that the
    job starts have keys of their own."""
    vllm_server_timeout: Annotated[float, Field(gt=0)] = 1800.0
    """Longest wait in seconds for one answer, and for a server that the job starts; at most 60 for
    what a server only has to look up, such as whether it is well."""
    vllm_server_max_retries: Count = 5
    """Further tries, after growing pauses, of a call that failed in a way that can pass: no
    connection, too many requests (429), errors of the server (5xx)."""
    use_vllm: bool | None = None
    """In other words: True is inference_engine: server where vllm_server is given, else vllm; False
    is transformers. None = as inference_engine says."""


class SpeculationArgs(Section):
    """Speculative decoding (vLLM)

    Something cheap drafts the next tokens, one step of the model verifies them all; responses are
    drawn with the same probabilities as without. docs/engines.md.
    """

    speculative_config: dict[str, Any] | None = None
    """vLLM's own map: method (ngram, draft_model, eagle, eagle3, ...), num_speculative_tokens,
    model (the draft's directory) and further fields of its SpeculativeConfig; None = no drafts."""
    speculative_model: Annotated[
        str | None, BeforeValidator(lambda name: "[ngram]" if name == ["ngram"] else name)
    ] = None
    """Older name of `model` in speculative_config; `[ngram]` is method ngram, else draft_model."""
    num_speculative_tokens: Positive | None = None
    """Older place of num_speculative_tokens: tokens that are drafted at a time."""
    speculative_min_gain: NonNegative = 1.0
    """Draft no more when generating with drafts is less than so many times as fast as without, as
    measured in the last episodes; 0 = always draft, and measure nothing."""


class ModuleArgs(Section):
    """Your own module"""

    user_args: dict[str, Any] = {}
    """Free-form map, unchecked: `self.model_args.user_args["my_setting"]`. Its keys are text."""


class ModelArgs(
    WeightArgs,
    ShapeArgs,
    ParallelArgs,
    MicroBatchArgs,
    OptimizerArgs,
    LoraArgs,
    AlgorithmArgs,
    PromptArgs,
    SamplingArgs,
    SchedulerArgs,
    ServerArgs,
    SpeculationArgs,
    ModuleArgs,
    MegatronArgs,
    UnusedArgs,
    LoggingArgs,
    RetiredArgs,
):
    """All settings of one model: attributes for our code, a read-only mapping for users.

    Example:
        args.seq_length == args["seq_length"] == args.get("seq_length")
    """

    engine_args: dict[str, Any] = {}
    """Keys that are vLLM EngineArgs fields and not in this schema, under vLLM's names."""
    sampling_args: dict[str, Any] = {}
    """The same for vLLM's SamplingParams."""
    transformer_args: dict[str, Any] = {}
    """The same for megatron-core's TransformerConfig."""

    PASS_THROUGH: ClassVar[tuple[str, ...]] = ("engine_args", "sampling_args", "transformer_args")

    @field_validator("sampling_args")
    @classmethod
    def _token_ids_are_numbers(cls, given: dict[str, Any]) -> dict[str, Any]:
        """Keys of a map are text where it was read from a file."""
        biases = given.get("logit_bias")
        if not isinstance(biases, dict):
            return given
        ids = {int(key) if str(key).isdecimal() else key: bias for key, bias in biases.items()}
        return given | {"logit_bias": ids}

    @property
    def responses_per_prompt(self) -> int:
        """Responses that each training prompt gets in an episode."""
        return self.num_inference_per_prompt * self.n

    def beam_width(self, *, is_eval: bool) -> int:
        """Beams of a search; 1 where responses are sampled."""
        if is_eval:
            return self.eval_num_beams
        if self.use_beam_search and self.num_beams == 1:
            return self.responses_per_prompt
        return self.num_beams

    def __getitem__(self, key: str) -> Any:
        if key in type(self).model_fields and key not in self.PASS_THROUGH:
            return getattr(self, key)
        for name in self.PASS_THROUGH:
            if key in getattr(self, name):
                return getattr(self, name)[key]
        raise KeyError(key)

    def __iter__(self) -> Iterator[str]:
        yield from (key for key in type(self).model_fields if key not in self.PASS_THROUGH)
        # A field that two libraries have is in two of the dicts.
        yield from dict.fromkeys(key for name in self.PASS_THROUGH for key in getattr(self, name))

    def __len__(self) -> int:
        return sum(1 for _ in self)

    __contains__ = Mapping.__contains__
    get = Mapping.get
    keys = Mapping.keys
    values = Mapping.values
    items = Mapping.items


Mapping.register(ModelArgs)
