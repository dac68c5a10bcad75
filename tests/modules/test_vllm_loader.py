"""Do whole checkpoints reach a running engine through vLLM's own loader?

Real engines on real ranks are compared with Hugging Face's greedy answers in float32.
"""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from chatlearn_vllm.engines import vllm_compat
from tests.helpers import rollout_ranks
from tests.helpers.ranks import RanksBySize
from tests.helpers.tiny_llama import save_tiny_llama

CASES = {
    "tp1": (1, 1, False),
    "tp1, tied": (1, 1, True),
    "tp2, tied": (2, 1, True),
    "pp2": (1, 2, False),
    "pp2, tied": (1, 2, True),
}


@pytest.fixture(scope="module")
def ranks():
    """`ranks[n].run(function, ...)` runs a module-level function on n ranks."""
    by_size = RanksBySize(2)
    yield by_size
    by_size.close()


def save_two(root: Path, *, tied: bool = False) -> tuple[Path, Path]:
    """Two checkpoints of one shape and unlike weights."""
    for seed in (0, 1):
        (root / str(seed)).mkdir()
        save_tiny_llama(root / str(seed), tied=tied, seed=seed)
    return root / "0", root / "1"


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(case, marks=[pytest.mark.slow] * (case in ("tp1, tied", "pp2")))
        for case in CASES
    ],
)
def test_the_engine_answers_from_the_checkpoint_loaded_last(ranks, tmp_path, case) -> None:
    tp, pp, tied = CASES[case]
    first, second = save_two(tmp_path, tied=tied)
    group = ranks[tp * pp]
    group.run(rollout_ranks.build, tmp_path / "job", first, tp, pp)
    for version, checkpoint in enumerate((first, second, first), start=1):
        states = group.run(rollout_ranks.load_checkpoint, checkpoint, version)
        assert set(states) == {f"READY({version})"}
        expected = rollout_ranks.hugging_face_answers(checkpoint)
        for answers in group.run(rollout_ranks.answers):
            rollout_ranks.assert_same_answers(answers, expected)
    group.run(rollout_ranks.write_checkpoint, second, 4)
    expected = rollout_ranks.hugging_face_answers(second)
    for answers in group.run(rollout_ranks.answers):
        rollout_ranks.assert_same_answers(answers, expected)
    group.run(rollout_ranks.drop)


def load_in_pieces(checkpoint: Path, fault: str) -> tuple[str, str]:
    """On a rollout rank: load with a fault; the error and the engine's state after it."""
    tensors = sorted(load_file(checkpoint / "model.safetensors").items())

    def faulty():
        for number, (name, tensor) in enumerate(tensors):
            if number == len(tensors) // 2:
                if fault == "source raises":
                    raise OSError("the trainer is gone")
                if fault == "tensor left out":
                    continue
                if fault == "tensor twice":
                    yield name, tensor
                if fault == "unknown tensor":
                    yield name + "s", tensor
                if fault == "wrong shape":
                    tensor = tensor[:-1]
            yield name, tensor

    engine = rollout_ranks.policy().engine
    try:
        engine.load_weights(faulty())
    except Exception as error:
        return f"{type(error).__name__}: {error}", str(engine.state)
    return "", str(engine.state)


def test_a_load_that_fails_leaves_a_stale_engine_that_can_be_loaded_again(ranks, tmp_path) -> None:
    first, second = save_two(tmp_path)
    expected = {path: rollout_ranks.hugging_face_answers(path) for path in (first, second)}
    group = ranks[1]
    group.run(rollout_ranks.build, tmp_path / "job", first, 1, 1)
    group.run(rollout_ranks.load_checkpoint, first, 1)
    faults = {
        "source raises": "OSError: the trainer is gone",
        "tensor left out": "ValueError: load_weights(): 1 tensors did not come: model.layers.",
        "tensor twice": "is unknown, or came twice",
        "unknown tensor": "is unknown, or came twice",
        "wrong shape": "the model's is (",
    }
    for fault, message in faults.items():
        [(error, state)] = group.run(load_in_pieces, second, fault)
        assert message in error
        assert state == "STALE(1)", fault
        group.run(rollout_ranks.load_checkpoint, second, 2)
        rollout_ranks.assert_same_answers(group.run(rollout_ranks.answers)[0], expected[second])
        group.run(rollout_ranks.load_checkpoint, first, 1)
    rollout_ranks.assert_same_answers(group.run(rollout_ranks.answers)[0], expected[first])
    group.run(rollout_ranks.drop)


def sync_paths() -> dict[str, str]:
    """On a rollout rank: the path for every value of the yaml key and its reason, or the error."""
    from chatlearn_vllm.modules.policy_weights import PolicyWeights

    paths = {}
    for wanted in ("auto", "direct", "load_weights"):
        try:
            weights = PolicyWeights(rollout_ranks.policy().engine, wanted)
            paths[wanted] = "direct" if weights.is_direct else f"loader: {weights.reason}"
        except ValueError as error:
            paths[wanted] = str(error)
    return paths


def sync_paths_of_another_model() -> dict[str, str]:
    """On a rollout rank: the same while a parameter is there that the layouts do not know."""
    layer = rollout_ranks.policy().model.model.layers[0].mlp.down_proj
    layer.register_parameter("weight_scale", torch.nn.Parameter(torch.ones(1)))
    try:
        return sync_paths()
    finally:
        del layer.weight_scale


def sync_paths_of_a_quantised_layer() -> dict[str, str]:
    """On a rollout rank: the same while a layer has another method than it was loaded with."""
    from vllm.model_executor.layers.quantization.fp8 import Fp8LinearMethod

    layer = rollout_ranks.policy().model.model.layers[0].mlp.down_proj
    unquantised, layer.quant_method = layer.quant_method, object.__new__(Fp8LinearMethod)
    try:
        return sync_paths()
    finally:
        layer.quant_method = unquantised


def stamped_versions() -> list[str]:
    """On a rollout rank: the weight versions that vLLM itself notes in an answer."""
    engine = rollout_ranks.policy().engine
    engine.add_request("0", None, [5, 6], {"temperature": 0.0, "max_tokens": 3})
    [output] = engine.run()
    return [span.version for span in output.outputs[0].weight_versions]


def test_the_path_is_direct_where_parameters_are_as_described(ranks, tmp_path) -> None:
    first, _ = save_two(tmp_path)
    group = ranks[1]
    group.run(rollout_ranks.build, tmp_path / "job", first, 1, 1)
    [paths] = group.run(sync_paths)
    asked = "loader: weight_sync_path: load_weights"
    assert paths == {"auto": "direct", "direct": "direct", "load_weights": asked}
    for make, reason in (
        (sync_paths_of_another_model, "model.layers.0.mlp.down_proj.weight_scale"),
        (sync_paths_of_a_quantised_layer, "mlp.down_proj is quantised (Fp8LinearMethod)"),
    ):
        [paths] = group.run(make)
        assert paths["auto"].startswith("loader: ")
        assert paths["direct"].startswith("weight_sync_path: direct is not possible")
        assert all(reason in path for path in paths.values())

    group.run(rollout_ranks.load_checkpoint, first, 7)
    if vllm_compat.installed_version().release >= (0, 32):
        assert group.run(stamped_versions) == [["7"]]
    group.run(rollout_ranks.drop)
