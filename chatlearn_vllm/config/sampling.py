"""Which keys make the rollout's log-probabilities mean something else than the trainer's?

The trainer's are of softmax(logits / temperature) over the whole vocabulary. vLLM reports, as its
`logprobs_mode` says, those of the distribution that it sampled from (processed_logprobs, what a
job asks for), or those of the model's plain softmax (raw_logprobs).
"""

from chatlearn_vllm.config.model_args import ModelArgs

_NEUTRAL = {
    "top_p": 1.0,
    "min_p": 0.0,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
    "repetition_penalty": 1.0,
}
"""Values with which responses are drawn from the model's whole softmax."""

_VLLM_KEYS = (
    "min_tokens", "logit_bias", "allowed_token_ids", "bad_words", "structured_outputs",
    "thinking_token_budget", "watermarking", "trace_decode_token_ids",
)  # fmt: skip
"""Further fields of vLLM's SamplingParams that change the distribution where they are set."""


_OF_WHOLE_RESPONSES = (
    "min_tokens", "structured_outputs", "thinking_token_budget", "repetition_detection",
    "trace_decode_token_ids", "bad_words",
)  # fmt: skip
"""Those of SamplingParams that count or read a response from its beginning."""


def changed_sampling(args: ModelArgs) -> list[str]:
    """Keys, as `key=value`, by which responses are not drawn from the whole softmax."""
    if (width := args.beam_width(is_eval=False)) > 1:
        return ["use_beam_search=True" if args.num_beams == 1 else f"num_beams={width}"]
    names = [name for name, neutral in _NEUTRAL.items() if args[name] != neutral]
    names += ["top_k"] if args.top_k > 0 else []
    names += [name for name in _VLLM_KEYS if args.sampling_args.get(name)]
    return [f"{name}={args[name]!r}" for name in names]


def sampling_keys_of_whole_responses(args: ModelArgs) -> list[str]:
    """Keys, as `key=value`, that look at a whole response, or ask something of its prompt."""
    penalties = ("presence_penalty", "frequency_penalty", "repetition_penalty")
    names = [name for name in penalties if args[name] != _NEUTRAL[name]]
    names += ["prompt_logprobs"] if args.prompt_logprobs is not None else []
    names += [name for name in _OF_WHOLE_RESPONSES if args.sampling_args.get(name)]
    return [f"{name}={args[name]!r}" for name in names]


def incomparable_logprobs(policy: ModelArgs, trainer: ModelArgs) -> list[str]:
    """Why the log-probabilities of the two sides cannot be compared.

    Args:
        policy: settings of the model that generates.
        trainer: settings of the model that is trained.

    Returns:
        Settings of the policy in words; empty if equal weights give equal log-probabilities.
    """
    mode = policy.engine_args.get("logprobs_mode", "processed_logprobs")
    if mode == "raw_logprobs":
        reasons, temperature, key = [], 1.0, "logprobs_mode='raw_logprobs', which is temperature 1"
    else:
        reasons, temperature = changed_sampling(policy), policy.temperature
        key = f"temperature={temperature:g}"
    if temperature != trainer.temperature:
        reasons.append(f"{key}, while the trainer's is {trainer.temperature:g}")
    return reasons
