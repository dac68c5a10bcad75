"""Make a model of random weights and a small draft that agrees with it, to measure drafts with.

    python benchmarks/agreeing_draft.py --shape 8b --out PAIR
    chatlearn-vllm bench vllm-module vllm-module:speculative --model PAIR/model --draft PAIR/draft

The draft is the model's first layers with its embedding, norm and output layer. What each later
layer of the model adds to the hidden state is made smaller by a factor, which decides how far the
model moves away from its draft: 0 = not at all. Both run at the cost of their sizes.
"""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import save_torch_state_dict
from transformers import LlamaConfig, LlamaForCausalLM

from chatlearn_vllm.bench.options import SHAPES
from chatlearn_vllm.bench.workload import made_config, make_model

WRITES_TO_HIDDEN_STATE = ("self_attn.o_proj.weight", "mlp.down_proj.weight")


def main() -> None:
    """Write both."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=SHAPES, default="tiny", help="of the model")
    parser.add_argument("--draft-layers", type=int, default=2, help="layers that the draft has")
    parser.add_argument("--damping", type=float, default=0.1, help="factor of later layers")
    parser.add_argument("--seq-length", type=int, default=2048, help="longest sequence, in tokens")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True, help="directory to be made")
    arguments = parser.parse_args()

    config = made_config(arguments.shape, arguments.seq_length)
    num_layers = config["num_hidden_layers"]
    if not 0 < arguments.draft_layers < num_layers:
        parser.error(f"--draft-layers {arguments.draft_layers}: must be from 1 to {num_layers - 1}")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = dict(weights(config, arguments.seed, arguments.draft_layers, arguments.damping, device))
    draft_config = config | {"num_hidden_layers": arguments.draft_layers}
    draft = {name: model[name] for name in names_and_shapes(draft_config)}
    for name, own_config, state in (("model", config, model), ("draft", draft_config, draft)):
        make_model(own_config, arguments.out / name)
        save_torch_state_dict(state, arguments.out / name)
    sizes = {
        name: sum(t.numel() for t in s.values()) for name, s in (("model", model), ("draft", draft))
    }
    print(json.dumps({"out": str(arguments.out), "parameters": sizes}))


def names_and_shapes(config: dict[str, Any]) -> dict[str, torch.Size]:
    """Of the parameters that a checkpoint holds."""
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(**config))
    return {name: parameter.shape for name, parameter in model.named_parameters()}


def weights(
    config: dict[str, Any], seed: int, draft_layers: int, damping: float, device: str
) -> Iterator[tuple[str, torch.Tensor]]:
    """Random weights, bfloat16, on `device`; later layers write less to the hidden state."""
    generator = torch.Generator(device).manual_seed(seed)
    for name, shape in names_and_shapes(config).items():
        weight = torch.ones(shape, dtype=torch.bfloat16, device=device)
        if len(shape) > 1:
            weight.normal_(0, config["initializer_range"], generator=generator)
        parts = name.split(".")  # model.layers.7.mlp.down_proj.weight
        is_later = parts[1] == "layers" and int(parts[2]) >= draft_layers
        if is_later and name.endswith(WRITES_TO_HIDDEN_STATE):
            weight *= damping
        yield name, weight


if __name__ == "__main__":
    main()
