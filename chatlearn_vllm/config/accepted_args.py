"""Which keys of a model's yaml file are accepted so that files of others load, without effect?"""

from typing import ClassVar, Literal

from chatlearn_vllm.config.section import Count, Integers, NonNegative, Positive, Section


class MegatronArgs(Section):
    """Keys of Megatron-LM that follow from something else here

    Accepted so that files made for ChatLearn load; one notice at start names those that are set to
    something else than what happens. Their defaults are what happens, or None.
    """

    no_effect: ClassVar[str] = "docs/configuration.md says what each of them follows from"

    use_legacy_models: bool = False
    """Megatron's models of before megatron-core; here always megatron-core's."""
    swiglu: bool = True
    """Gated SiLU in the MLP; config.json: hidden_act."""
    group_query_attention: bool | None = None
    """Fewer key/value than query heads; config.json: num_key_value_heads."""
    add_position_embedding: bool = False
    """Learned positions; not in the models that are trained here."""
    use_rotary_position_embeddings: bool = True
    """Rotary positions; all models that are trained here have them."""
    position_embedding_type: str = "rope"
    """The same in one word."""
    max_position_embeddings: Positive | None = None
    """Longest sequence that the model was made for; config.json has the same key."""
    rotary_base: float | None = None
    """config.json: rope_theta."""
    rotary_percent: float = 1.0
    """Share of a head that is rotated."""
    rotary_seq_len_interpolation_factor: float = 1
    """config.json: rope_scaling."""
    norm_epsilon: float | None = None
    """config.json: rms_norm_eps."""
    untie_embeddings_and_output_weights: bool = True
    """config.json: tie_word_embeddings."""
    vocab_size: Positive | None = None
    """config.json has the same key."""
    extra_vocab_size: Count | None = None
    """Unused tokens at the vocabulary's end; config.json counts them."""
    make_vocab_size_divisible_by: Positive | None = None
    """The vocabulary is padded to a multiple of this; here to one of the tensor parallel size."""
    tokenizer_type: str | None = None
    """Class of the tokenizer; its files say it."""
    patch_tokenizer_type: str | None = None
    """The same for the models of Megatron's patches."""
    tokenizer_model: str | None = None
    """sentencepiece file; here `tokenizer` names the directory."""
    vocab_file: str | None = None
    """File of a GPT-2 tokenizer; here `tokenizer` names the directory."""
    merge_file: str | None = None
    """As vocab_file."""
    load_iteration: Count | None = None
    """Iteration of the checkpoint in `load`, which here is in Hugging Face form; where to resume
    says runtime.load_data_checkpoint_iteration."""
    finetune: bool = True
    """Take only the weights of `load`; always so."""
    exit_on_missing_checkpoint: bool = True
    """End where `load` has nothing; always so where a directory is named that is not there."""
    use_dist_ckpt: bool = True
    """Checkpoints in megatron-core's distributed format; always so."""
    use_checkpoint_args: bool = False
    """Take settings of the checkpoint; here its config.json always says the structure."""
    use_checkpoint_opt_param_scheduler: bool = False
    """Take the schedule of the checkpoint; here of one that is resumed from."""
    no_load_optim: bool = True
    """Leave the optimizer's state in `load` out; it has none. A resume takes it."""
    no_load_rng: bool = True
    """As no_load_optim, for the random generators' state."""
    no_load_args: bool = True
    """As no_load_optim, for the saved arguments."""
    no_load_scheduler: bool = True
    """As no_load_optim, for the schedule's state."""
    save_interval: Positive | None = None
    """Iterations between checkpoints; here runtime.save_episode_interval, in episodes."""
    log_interval: Count | None = None
    """Iterations between log lines; here runtime.log_interval, in episodes."""
    train_iters: Positive | None = None
    """Optimizer steps of the job; here they follow from the keys of runtime."""
    num_workers: Count | None = None
    """Processes that load data; here none, responses are made in the job."""
    hysteresis: Positive | None = None
    """Overflows before the fp16 loss scale falls."""
    distributed_backend: Literal["nccl", "gloo"] | None = None
    """torch.distributed backend; here nccl on GPUs, gloo on CPUs."""
    use_attn_acc: bool = False
    """Attention kernel of an accelerator; as use_flash_attn."""
    use_flash_attn: bool | Literal[0, 1] | None = None
    """Attention kernel; here torch's choice, see attention_backend for vLLM."""
    parallel_output: bool = True
    """Leave logits split over the tensor parallel ranks; always so."""
    log_num_zeros_in_grad: bool | None = None
    """Count gradients that are 0."""
    inference_batch_times_seqlen_threshold: int | None = None
    """Size of a forward pass above which the pipeline cuts it; here generation_batch_size or
    max_tokens_per_micro_batch."""
    hidden_dropout: NonNegative = 0.0
    """Dropout behind attention and MLP in training; here 0: with dropout the trainer would not
    score tokens as the rollout sampled them."""
    attention_dropout: NonNegative = 0.0
    """Dropout of attention probabilities; as hidden_dropout."""
    retro_encoder_attention_dropout: NonNegative | None = None
    """Dropout of a retrieval encoder; no model here has one."""
    retro_encoder_hidden_dropout: NonNegative | None = None
    """As retro_encoder_attention_dropout."""
    build_path: str | None = None
    """Directory of compiled kernels; none are compiled."""
    allow_padding_num_layers: bool = False
    """ChatLearn: pad the number of layers to a multiple of the pipeline stages; here
    num_layers_in_first_pipeline_stage and num_layers_in_last_pipeline_stage."""
    pipeline_layers: Integers | None = None
    """ChatLearn: layers of each pipeline stage; as allow_padding_num_layers."""
    standalone_embedding_stage: bool = False
    """ChatLearn: a pipeline stage for the embedding alone."""


class UnusedArgs(Section):
    """Keys of ChatLearn that nothing here reads

    Accepted so that files made for ChatLearn load; one notice at start names those that are set.
    Your own module may read them: `self.model_args["lm_coef"]`.
    """

    no_effect: ClassVar[str] = "no built-in module reads them"

    adaptive_parallel_strategy_on_checkpoint: bool = True
    """ChatLearn: load checkpoints of other parallel sizes; here always possible."""
    init_shuffle_prompts: Literal[0, 1, 2] = 0
    """ChatLearn: order of the copies of a prompt, 0 = adjacent, as here."""
    num_tokenize_threads: Positive = 4
    """ChatLearn: threads that tokenize the prompts."""
    trainer_engine: str | None = None
    """ChatLearn: name of the training algorithm; here the engine class says it."""
    train_to_compare_num_responses: Positive = 1
    """ChatLearn: responses per prompt in reward training."""
    loss_on_prompts: bool = False
    """ChatLearn: also train on prompt tokens."""
    ngram_coef: float = 1
    """PPO reward: weight of the n-gram term."""
    lm_coef: float = 0
    """PPO reward: weight of the language model term."""
    math_coef: float = 0
    """PPO reward: weight of the math term."""
    raw_reward_coeff: float = 1
    """PPO reward: weight of the reward model."""
    numerical_stable: bool = True
    """PPO: clamp log ratios."""
    scale_reward: str | None = None
    """PPO reward: how rewards are scaled; not at all here, see advantage_std for GRPO."""
    reward_bias: float = 0
    """PPO reward: number taken from each reward; here rewards are what the model says."""
    clipped_value_only: bool | Literal[0, 1] = False
    """PPO: the value loss of the clipped value alone; here the larger of both, as published."""
    math_reward_strategy: str | None = None
    """GRPO with a rule and a reward model: which counts; here both, times reward_weight."""
    do_math_eval: bool | Literal[0, 1] = False
    """PPO reward: also score with a rule in evaluation."""
    use_eod_token_for_early_termination: bool = True
    """Responses end with EOS; here ignore_eos: True goes on."""
    max_tokens_to_oom: Positive | None = None
    """Most tokens of a generation batch; vLLM schedules within max_num_batched_tokens."""
    log_entropy: bool | None = None
    """PPO: log the entropy; always done here."""
    save_inference: bool = False
    """PPO reward: write responses to files."""
    save_inference_interval: Positive | None = None
    """PPO reward: iterations between two such files."""
    pos_clip_ratio: NonNegative | None = None
    """ChatLearn's GRPO: clip distance above 1; here cliprange_high."""
    neg_clip_ratio: NonNegative | None = None
    """ChatLearn's GRPO: clip distance below 1; here cliprange."""
    final_clip_ratio: NonNegative | None = None
    """ChatLearn's GRPO: largest loss of a token; here dual_clip."""
    diff_clip_ratio: NonNegative | None = None
    """ChatLearn's GRPO: largest log of the probability ratio."""
    logprob_cliprange: NonNegative | None = None
    """ChatLearn's GRPO: read nowhere in ChatLearn."""
    neg_cliprange2: NonNegative | None = None
    """ChatLearn's GRPO: read nowhere in ChatLearn."""
    clip_onlineness: bool | Literal[0, 1] | None = None
    """ChatLearn's GRPO: read nowhere in ChatLearn."""
    cliprange_onlineness: NonNegative | None = None
    """ChatLearn's GRPO: read nowhere in ChatLearn."""
    lr_freeze_episodes: Count = 0
    """ChatLearn's GRPO: read nowhere in ChatLearn."""
    use_dynamic_collate: bool = False
    """ChatLearn's GRPO: read nowhere in ChatLearn."""
    dummy: int | None = None
    """ChatLearn's GRPO: read nowhere in ChatLearn."""
    drop_last: bool = False
    """ChatLearn: drop the last incomplete batch of prompts."""
    enable_stage_resume: bool = False
    """ChatLearn: keep the responses of an interrupted episode."""
    log_stats: bool = False
    """ChatLearn: vLLM's log line of statistics; see log_metrics."""
    detokenize: bool = True
    """ChatLearn: make text of responses; always done here."""
    vllm_prompt_key: str = "prompt"
    """ChatLearn: batch key of the prompt's text; here always `prompt`."""
    vllm_input_ids_key: str = "input_ids"
    """ChatLearn: batch key of the prompt's tokens; here always `input_ids`."""


class LoggingArgs(Section):
    """Keys of ChatLearn's metric loggers, which nothing here reads

    Accepted so that files made for ChatLearn load; one notice at start names those that are set.
    """

    no_effect: ClassVar[str] = (
        "metrics go to metrics.jsonl and TensorBoard in runtime.output_dir, under runtime.exp_name"
    )

    exp_name: str | None = None
    """Name of the experiment; here runtime.exp_name."""
    log_dir: str | None = None
    """Directory of the metrics; here in runtime.output_dir."""
    enable_tensorboard: bool | None = None
    """Write TensorBoard files; always done where TensorBoard is installed."""
    tensorboard_dir: str | None = None
    """Directory of TensorBoard's files; here in runtime.output_dir."""
    enable_wandb: bool = False
    """Log to Weights & Biases."""
    wandb_dir: str | None = None
    """Its directory."""
    wandb_project: str | None = None
    """Its project."""
    wandb_id: str | None = None
    """Its run."""
    wandb_name: str | None = None
    """Name of its run."""
    wandb_resume: str | None = None
    """Whether its run goes on."""


class RetiredArgs(Section):
    """Keys that vLLM's V1 engine no longer has

    Accepted so that older files load; one notice at start names those that are set.
    """

    no_effect: ClassVar[str] = "vLLM's V1 engine has no such setting"

    max_paddings: Count | None = None
    """Padding tokens of a batch; V1 batches have no padding."""
    swap_space: NonNegative | None = None
    """GiB of host memory for preempted requests; V1 computes them again."""
    sliding_window: Positive | None = None
    """Attention window; it comes from the model's config.json."""
    use_v2_block_manager: bool | None = None
    """V1 has one block manager."""
    num_scheduler_steps: Positive | None = None
    """Multi-step scheduling; V1 schedules asynchronously instead."""
    max_seq_len_to_capture: Positive | None = None
    """Longest sequence for CUDA graphs; V1 captures by batch size."""
    max_context_len_to_capture: Positive | None = None
    """Older name of max_seq_len_to_capture."""
    preemption_mode: str | None = None
    """V1 always recomputes."""
    disable_log_requests: bool | None = None
    """V1 does not log requests unless asked to."""
