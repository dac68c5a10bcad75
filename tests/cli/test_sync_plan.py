"""What does `chatlearn-vllm sync-plan` say, and what does it refuse?"""

import itertools
import json
import subprocess
import sys
from pathlib import Path

import pytest

from chatlearn_vllm.cli.main import main
from chatlearn_vllm.layouts import ParamLayout
from chatlearn_vllm.weight_sync.planner import Copy, RankPlan
from chatlearn_vllm.weight_sync.report import _sample, check_written_once

DENSE = {
    "model_type": "llama", "num_hidden_layers": 4, "hidden_size": 64, "intermediate_size": 128,
    "num_attention_heads": 8, "num_key_value_heads": 8, "vocab_size": 128,
}  # fmt: skip
EXPERTS = DENSE | {"model_type": "qwen3_moe", "num_experts": 8, "moe_intermediate_size": 32}
MATRICES = 2 * 128 * 64 + 4 * (4 * 64 * 64 + 3 * 128 * 64)
NORMS = (4 * 2 + 1) * 64
"""Elements of DENSE."""


@pytest.fixture
def model(tmp_path):
    """Writes a config.json; gives its folder."""

    def write(config: dict, **changes) -> str:
        (tmp_path / "config.json").write_text(json.dumps(config | changes))
        return str(tmp_path)

    return write


def run_json(capsys, model_dir: str, train: str, rollout: str, *options: str) -> dict:
    command = ["sync-plan", "--model", model_dir, "--train", train, "--rollout", rollout, "--json"]
    assert main([*command, *options]) == 0
    return json.loads(capsys.readouterr().out)


def test_equal_layouts_on_one_gpu_stay_on_it(model, capsys):
    result = run_json(capsys, model(DENSE), "tp=1", "tp=1")
    assert result["num_parameters"] == MATRICES + NORMS
    assert result["model_bytes"] == 2 * (MATRICES + NORMS)
    everything = 2 * (MATRICES + NORMS)
    assert result["links"] == {
        kind: {
            "num_bytes": num_bytes,
            "busiest_reader_bytes": num_bytes,
            "busiest_sender_bytes": num_bytes,
        }
        for kind, num_bytes in (("same GPU", everything), ("same host", 0), ("network", 0))
    }
    assert result["staging_bytes"] == 0
    assert result["predicted_s"] == pytest.approx(2 * (MATRICES + NORMS) / 1.9e12)
    # Per layer: q, k and v of each head, o, gate, up, down and two norms; three without a layer.
    assert result["num_copies"] == result["max_copies_per_rank"] == 4 * (3 * 8 + 6) + 3


def test_bytes_are_counted_by_what_they_cross(model, capsys):
    sizes = ("pp=2", "tp=1,replicas=2")
    weights = 4 * (MATRICES + NORMS)
    model_dir = model(DENSE, dtype="float32")
    for per_host, crossed, other in (("2", "same host", "network"), ("1", "network", "same host")):
        result = run_json(capsys, model_dir, *sizes, "--gpus-per-host", per_host)
        assert result["links"]["same GPU"]["num_bytes"] == weights
        assert result["links"][crossed]["num_bytes"] == weights
        assert result["links"][other]["num_bytes"] == 0
    assert result["num_hosts"] == 2
    # Layers of the other stage, an embedding or output layer, the last norm: one message.
    assert result["staging_bytes"] == result["links"]["network"]["busiest_reader_bytes"]
    slow = run_json(capsys, model_dir, *sizes, "--gpus-per-host", "1", "--network-gbs", "5")
    assert slow["predicted_s"] == pytest.approx(10 * result["predicted_s"], rel=0.05)


def test_both_sides_fill_the_gpus(model, capsys):
    result = run_json(capsys, model(DENSE), "tp=2,pp=2", "tp=4", "--gpus", "16")
    assert result["train"]["world_size"] == 16
    assert result["rollout"]["replicas"] == 4
    assert (result["num_gpus"], result["num_hosts"]) == (16, 2)
    result = run_json(capsys, model(DENSE), "tp=2", "tp=1")
    assert (result["train"]["world_size"], result["rollout"]["replicas"]) == (2, 2)


def test_more_than_64_ranks_are_judged_by_a_sample(model, capsys):
    full = run_json(capsys, model(EXPERTS), "tp=2,ep=2,etp=1", "tp=2,ep=true", "--gpus", "64")
    assert not full["is_sample"]
    assert (full["num_readers_planned"], full["num_senders_planned"]) == (64, 64)
    part = run_json(capsys, model(EXPERTS), "tp=2,ep=2,etp=1", "tp=2,ep=true", "--gpus", "128")
    assert part["is_sample"]
    assert (part["num_readers_planned"], part["num_senders_planned"]) == (16, 16)
    total = {kind: links["num_bytes"] for kind, links in part["links"].items()}
    assert sum(total.values()) == 2 * sum(links["num_bytes"] for links in full["links"].values())


def test_a_sample_holds_no_rank_twice_and_leaves_no_large_gap():
    for num_ranks in (*range(65, 300), 1000, 1024):
        ranks = _sample(num_ranks)
        gaps = [after - before for before, after in itertools.pairwise([*ranks, num_ranks])]
        assert (len(ranks), ranks[0]) == (16, 0)
        assert min(gaps) > 0
        assert max(gaps) <= num_ranks / 8


def test_totals_of_a_sample_are_those_of_all_ranks(model, capsys):
    # 112 = 7 x 16: ranks that are 7 apart and one more return to the first after 14.
    result = run_json(capsys, model(DENSE), "tp=1", "tp=1", "--gpus", "112")
    assert result["is_sample"]
    assert result["links"]["same GPU"]["num_bytes"] == 112 * 2 * (MATRICES + NORMS)


def test_a_network_link_stages_two_messages_at_most(model, capsys):
    large = model(DENSE, vocab_size=10**6)
    result = run_json(capsys, large, "dp=1", "tp=1,replicas=2", "--gpus-per-host", "1")
    assert result["links"]["network"]["num_bytes"] > 2**27
    assert result["staging_bytes"] == 2 * 64 * 2**20


def test_experts_ask_for_the_gpus_that_hold_them(model, capsys):
    model_dir = model(EXPERTS)
    for train, num_gpus in (("tp=2,ep=4", 8), ("tp=2,ep=4,etp=1", 4), ("pp=2,ep=8", 16)):
        result = run_json(capsys, model_dir, train, "tp=4,ep=4")
        assert result["train"]["world_size"] == result["num_gpus"] == num_gpus
        assert result["rollout"]["expert"]


def test_the_text_names_sizes_coverage_and_links(model, capsys):
    command = ["sync-plan", "--model", model(DENSE), "--train", "tp=4,pp=2", "--rollout", "tp=8"]
    assert main(command) == 0
    out = capsys.readouterr().out
    for line in (
        "model      llama, 4 layers, 181 k parameters, 362 kB in bfloat16",
        "training   8 ranks: tp 4, pp 2",
        "rollout    8 ranks: tp 8",
        "planned    8 of 8 rollout ranks, 8 of 8 training ranks",
        "coverage   complete: every rollout element is written once, every trained weight is used",
        "staging    none",
        "network                   0 B               0 B               0 B",
    ):
        assert line in out.splitlines(), out


@pytest.mark.parametrize(
    ("train", "rollout", "options", "message"),
    [
        ("tp=2,xp=3", "tp=1", [], "--train tp=2,xp=3: 'xp' is not one of tp, pp, vpp, ep"),
        ("tp=two", "tp=1", [], "--train tp=two: tp=two must be a positive integer"),
        ("tp=2", "tp", [], "--rollout tp: tp= must be a positive integer"),
        ("tp=2", "tp=0", [], "--rollout tp=0: tp=0 must be a positive integer"),
        ("tp=2,tp=2", "tp=1", [], "--train tp=2,tp=2: tp is given twice"),
        ("tp=3", "tp=3", [], "--train tp=3: training: attention heads 8 cannot be cut by"),
        ("tp=1", "tp=3", ["--gpus", "3"], "--rollout tp=3: rollout: attention heads 8 cannot be"),
        ("tp=1", "tp=1,ep=2", [], "--rollout tp=1,ep=2: ep must be true, or tp = 1"),
        ("tp=1", "ep=True", [], "enable_expert_parallel: the model has no experts"),
        ("tp=1", "ep=false", [], "--rollout ep=false: ep=false must be a positive integer"),
        ("ep=2", "tp=1", [], "--train ep=2: expert parallel size 2: the model has no experts"),
        ("etp=2", "tp=1", [], "--train etp=2: etp=2: the model has no experts"),
        ("pp=1,first=2,last=2", "tp=1", [], "over 1 pipeline stages with 2 in the first and"),
        ("pp=2,first=5", "tp=1", [], "over 2 pipeline stages with 5 in the first"),
        ("tp=" + 5000 * "9", "tp=1", [], "must be a positive integer"),
        ("dp=20000", "tp=1", [], "--train dp=20000: tp x pp x dp = 20000: must be at most 16384"),
        ("tp=1", "replicas=20000", [], "tp x pp x replicas = 20000: must be at most 16384 GPUs"),
        ("tp=1", "tp=1", ["--gpus", "20000"], "--gpus 20000: must be at most 16384 GPUs"),
        ("tp=1", "tp=1,ep=1", [], "enable_expert_parallel: the model has no experts"),
        ("pp=3", "tp=1", [], "--train pp=3: 4 layers cannot be spread over 3 pipeline stages"),
        ("vpp=2", "tp=1", [], "--train vpp=2: virtual pipeline stages need a pipeline parallel"),
        ("tp=4", "tp=1", ["--gpus", "6"], "6 GPUs cannot be filled with copies of tp x pp = 4"),
        ("tp=4,dp=2", "tp=1", ["--gpus", "6"], "tp x pp x dp = 8 ranks exceed --gpus 6"),
        ("tp=2", "tp=4", ["--gpus", "6"], "--rollout tp=4: 6 GPUs cannot be filled with replicas"),
        ("tp=2", "tp=4,replicas=2", ["--gpus", "6"], "tp x pp x replicas = 8 ranks exceed --gpus"),
        ("tp=1", "tp=1", ["--gpus", "0"], "--gpus 0: must be positive"),
        ("tp=1", "tp=1", ["--gpus-per-host", "0"], "--gpus-per-host 0: must be positive"),
        ("tp=1", "tp=1", ["--network-gbs", "-1"], "--network-gbs -1: must be positive"),
    ],
)  # fmt: skip
def test_sizes_that_cannot_be_are_one_message(model, capsys, train, rollout, options, message):
    command = ["sync-plan", "--model", model(DENSE), "--train", train, "--rollout", rollout]
    assert main([*command, *options]) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert len(captured.err.splitlines()) == 1
    assert captured.out == ""


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "must hold a config.json"),
        ("{", "config.json is not JSON: Expecting property name"),
        ("[]", "config.json must hold an object, not list"),
        ('{"model_type": "mamba"}', "model_type='mamba' has no weight layout"),
        ('{"model_type": "llama"}', "missing num_hidden_layers"),
        (json.dumps(DENSE | {"dtype": "int8"}), "dtype='int8' must be one of bfloat16"),
        (json.dumps(DENSE | {"dtype": ["int8"]}), "dtype=['int8'] must be one of bfloat16"),
        (json.dumps(DENSE | {"hidden_size": "64"}), "hidden_size='64' must be a positive integer"),
        (json.dumps(DENSE | {"mlp_bias": True}), "mlp_bias=True has no weight layout"),
    ],
)
def test_a_model_that_cannot_be_read_is_one_message(tmp_path: Path, capsys, text, message):
    if text is not None:
        (tmp_path / "config.json").write_text(text)
    assert (
        main(["sync-plan", "--model", str(tmp_path), "--train", "tp=1", "--rollout", "tp=1"]) == 2
    )
    captured = capsys.readouterr()
    assert captured.err.startswith(f"--model {tmp_path}: ")
    assert message in captured.err
    assert len(captured.err.splitlines()) == 1


def test_an_element_written_twice_or_never_is_found():
    layouts = [ParamLayout("p", (4, 2), (), (((0, 4), (0, 2)),))]

    def plan(*rows: tuple[int, int]) -> RankPlan:
        copies = tuple(Copy(0, "s", ((a, b), (0, 2)), "p", ((a, b), (0, 2))) for a, b in rows)
        return RankPlan(copies, (("p", ((3, 4), (0, 2))),))

    check_written_once(plan((0, 1), (1, 3)), layouts)
    with pytest.raises(ValueError, match="overlap"):
        check_written_once(plan((0, 2), (1, 3)), layouts)
    with pytest.raises(ValueError, match="2 elements in no block"):
        check_written_once(plan((0, 1), (2, 3)), layouts)


def test_it_needs_no_gpu_library(model):
    code = f"""
import sys
from chatlearn_vllm.cli.main import main
main(["sync-plan", "--model", {model(EXPERTS)!r}, "--train", "tp=2,pp=2", "--rollout", "tp=2"])
print([name for name in ("torch", "ray", "vllm", "megatron", "numpy") if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
