"""Is it told which fields of TransformerConfig do nothing, or are of another model?"""

import json

import pytest

from chatlearn_vllm.config import ConfigError, load_config

OTHER_MODEL = "is of another model than config.json describes, and of that one are responses and"
DENSE = {"model_type": "llama", "rms_norm_eps": 1e-5, "head_dim": 64}
EXPERTS = {
    "model_type": "qwen3_moe", "num_experts": 4, "num_experts_per_tok": 2, "norm_topk_prob": True,
    "moe_intermediate_size": 24,
}  # fmt: skip


@pytest.fixture
def load(job, write, tmp_path):
    """Reads a job whose trainer has some fields, and a config.json."""

    def load_trainer(config=None, **fields):
        if config is not None:
            write("hf/config.json", json.dumps(config))
            fields["load"] = str(tmp_path / "hf")
        name = "models.policy_trainer"
        overrides = [f"{name}.model_args={json.dumps(fields)}"]
        start = f"{name}: no effect of "
        told = load_config(job, overrides).notices
        return [line.removeprefix(start) for line in told if line.startswith(start)]

    return load_trainer


@pytest.mark.parametrize(
    ("config", "field", "value", "rule"),
    [
        (DENSE, "layernorm_epsilon", 1e-6, "config.json says rms_norm_eps=1e-05; leave the key"),
        (DENSE, "kv_channels", 32, "config.json says head_dim=64; leave the key out"),
        (DENSE, "softmax_scale", 0.5, OTHER_MODEL),
        (DENSE, "rotary_interleaved", True, OTHER_MODEL),
        (DENSE, "normalization", "LayerNorm", OTHER_MODEL),
        (DENSE, "window_size", [4, 0], OTHER_MODEL),
        (EXPERTS, "num_moe_experts", 8, "config.json says num_experts=4; leave the key out"),
        (EXPERTS, "moe_router_topk", 1, "config.json says num_experts_per_tok=2; leave the key"),
        (EXPERTS, "moe_router_score_function", "sigmoid", OTHER_MODEL),
        (EXPERTS, "moe_router_pre_softmax", True, OTHER_MODEL),
        (EXPERTS | {"norm_topk_prob": False}, "moe_router_pre_softmax", False, OTHER_MODEL),
        (EXPERTS, "moe_router_load_balancing_type", ["aux_loss", "sinkhorn"], OTHER_MODEL),
        (EXPERTS, "moe_expert_capacity_factor", 1.5, OTHER_MODEL),
    ],
)
def test_another_model_than_config_json_describes_is_refused(load, config, field, value, rule):
    with pytest.raises(ConfigError) as caught:
        load(config, **{field: value})
    (problem,) = caught.value.problems
    assert problem.key == f"models.policy_trainer.model_args.{field}"
    assert rule in problem.rule


def test_fields_that_say_what_config_json_says_are_taken(load):
    same = {"layernorm_epsilon": 1e-5, "normalization": "RMSNorm", "fp8": None}
    assert load(DENSE, rotary_interleaved=False, **same) == []
    same = {"moe_router_topk": 2, "num_moe_experts": 4, "moe_router_topk_scaling_factor": 1.0}
    of_training = {"moe_aux_loss_coeff": 0.01, "moe_router_load_balancing_type": "seq_aux_loss"}
    assert load(EXPERTS, moe_router_pre_softmax=False, **same, **of_training) == []


def test_fields_that_do_nothing_are_told(load):
    assert load(init_method_std=0.006, persist_layer_norm=True, masked_softmax_fusion=True) == [
        "init_method_std=0.006; the weights are those of `load`; random ones have "
        "initializer_range of its config.json",
        "masked_softmax_fusion=True; attention is torch's scaled_dot_product_attention",
        "persist_layer_norm=True; norms are torch's",
    ]


def test_fields_of_experts_are_told_where_there_are_none(load, tmp_path):
    fields = {"moe_aux_loss_coeff": 0.01, "moe_router_dtype": "fp64"}
    assert load(DENSE, **fields) == [
        "moe_aux_loss_coeff=0.01, moe_router_dtype='fp64'; "
        f"{tmp_path}/hf/config.json describes no experts"
    ]
    assert load(EXPERTS, **fields) == load(None, **fields) == []
