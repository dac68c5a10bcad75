"""What a value model does in a job: predicts, learns returns, gets the trained one's weights."""

import os
import time

import pytest
import torch

from chatlearn_vllm.algorithms.value import value_loss
from chatlearn_vllm.layouts import ReplicatedShards
from chatlearn_vllm.modules.value_module import ValueModule
from chatlearn_vllm.weight_sync.digest import EVERYTHING
from chatlearn_vllm.weight_sync.links import LinkKind, Links, Place, colocated
from chatlearn_vllm.weight_sync.planner import IncompletePlanError, check_agreement
from chatlearn_vllm.weight_sync.remote import LinkAddress
from chatlearn_vllm.weight_sync.sender import WeightSender
from chatlearn_vllm.weight_sync.transport import OpenedExport
from tests.megatron import tiny_models
from tests.megatron.test_megatron_module import Scorer
from tests.megatron.test_scalar_head import hugging_face
from tests.megatron.tiny_modules import assert_same_metrics, built

TWO_HOSTS = Links([Place("one")], [Place("other")], ranks_per_replica=1)
PACKED = {"max_tokens_per_micro_batch": 44, "sequence_packing": True}


class Critic(ValueModule):
    def loss(self, batch, values):
        mask = batch["loss_mask"][:, 1:]
        return value_loss(values, batch["values"], batch["returns"], mask, cliprange=0.2)


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return tiny_models.save_model(tmp_path_factory.mktemp("llama"), head="scalar")


@pytest.fixture(scope="module")
def one_rank_metrics(ranks, llama):
    """Two optimizer steps on 4 of 8 rows each, in micro-batches of 4."""
    return ranks[1].run(train, llama, train_micro_batch_size=4)[0]


@pytest.mark.parametrize(
    ("world_size", "settings"), [(1, {}), (4, {"tp": 2, "pp": 2}), (2, {"pp": 2, **PACKED})]
)
def test_values_are_those_before_each_token_is_sampled(ranks, llama, world_size, settings):
    # entry t from the tokens up to t, where token t+1 is sampled
    expected = hugging_face(llama)["values"][:, :-1] * tiny_models.batch()["loss_mask"][:, 1:]
    for found in ranks[world_size].run(score, llama, **settings):
        assert found.keys() == {"values"}
        values = found["values"]
        assert values.shape == (8, tiny_models.SEQ_LENGTH - 1) and values.dtype == torch.float32
        assert (values - expected).abs().max() < 1e-5


@pytest.mark.parametrize(
    ("world_size", "settings"),
    [
        (2, {"train_micro_batch_size": 1}),
        (4, {"tp": 2, "pp": 2, "sequence_parallel": True}),
        (2, {"tp": 2, **PACKED}),
    ],
)
def test_metrics_depend_neither_on_micro_batches_nor_on_ranks(
    ranks, llama, one_rank_metrics, world_size, settings
):
    for metrics in ranks[world_size].run(train, llama, **settings):
        assert_same_metrics(metrics, one_rank_metrics)


def test_the_first_step_measures_the_loss_of_the_predictions(llama, one_rank_metrics):
    rows = {key: value[:4] for key, value in tiny_models.batch_with_returns().items()}
    mask = rows["loss_mask"][:, 1:]
    error = (hugging_face(llama)["values"][:4, :-1] - rows["returns"]).square() * mask
    first = one_rank_metrics[0]
    assert first["tokens"] == mask.sum()
    assert first["loss"] == pytest.approx(float(error.sum() / mask.sum() / 2), rel=1e-5)
    assert first["squared_error"] == pytest.approx(2 * first["loss"])
    assert "entropy" not in first


def test_rows_without_returns_are_refused(ranks, llama):
    (message,) = ranks[1].run(error_of_training, llama, Critic)
    assert message.startswith("models.trainer: train() needs all_tokens, loss_mask, returns, val")
    assert message.endswith("add returns, values")


def test_a_trained_model_without_a_loss_is_refused(ranks, llama):
    (message,) = ranks[1].run(error_of_training, llama, ValueModule, with_returns=True)
    assert message.startswith("models.trainer: ValueModule is trained (trainable: True): implement")


# ---- weight sync: the trained value model's weights into frozen ones ---------------------------


@pytest.fixture(scope="module")
def trained(ranks, llama):
    """What two tensor parallel ranks hold after training, and the values that they compute."""
    return ranks[2].run(train_and_export, llama, tp=2)


@pytest.mark.parametrize(
    ("num_replicas", "settings"), [(2, {}), (1, {"pp": 2}), (2, {"tp": 2, "pp": 2})]
)
def test_trained_weights_arrive_bitwise(ranks, llama, trained, num_replicas, settings):
    size = settings.get("tp", 1) * settings.get("pp", 1)
    (targets, *_) = ranks[size].run(describe, llama, num_replicas, **settings)
    sent, fingerprints = send(trained, targets, size)
    sources = trained[0]["shards"]
    expected = logical_tensors(
        sources.model,
        ((sources.rank_layouts(rank), one["weights"]) for rank, one in enumerate(trained)),
    )
    assert {"score.weight", "model.embed_tokens.weight"} < expected.keys()
    for replica in range(num_replicas):
        args = (llama, targets, trained, sent, replica * size)
        results = ranks[size].run(receive, *args, **settings)
        readers = {replica * size + rank: one["plan"] for rank, one in enumerate(results)}
        of_replica = {
            sender: {reader: text for reader, text in own.items() if reader in readers}
            for sender, own in fingerprints.items()
        }
        check_agreement(readers, of_replica)
        found = logical_tensors(
            sources.model, ((one["layouts"], one["weights"]) for one in results)
        )
        assert found.keys() == expected.keys()
        for name, tensor in expected.items():
            assert torch.equal(found[name], tensor), name
        for one in results:
            assert one["arrival"].is_good and one["arrival"].num_bytes > 0
            assert one["values_before"].ne(trained[0]["values"]).any()
            assert (one["values"] - trained[0]["values"]).abs().max() < 1e-5
            assert one["error_in_between"].startswith("the weights are STALE(None)")
            assert one["error_after_revoke"].startswith("the weights are STALE(None)")


def test_weights_over_a_link_arrive_bitwise(ranks, llama, tmp_path):
    sent, received = ranks[2].run(sync_over_a_link, llama, tmp_path)
    assert sent.keys() == received.keys()
    for name, tensor in sent.items():
        assert torch.equal(received[name], tensor), name


def test_a_copy_that_was_not_what_was_sent_keeps_the_weights_stale(ranks, llama, trained):
    (targets,) = ranks[1].run(describe, llama, 1)
    sent, _ = send(trained, targets, 1)
    for own in sent:
        own.digests[0][0][0] ^= 1
    (result,) = ranks[1].run(receive, llama, targets, trained, sent, 0)
    assert result["arrival"].num_wrong == 2  # one copy from each of both ranks
    assert result["error_after_revoke"].startswith("the weights are STALE")
    assert result["values"] is None


def test_offloaded_weights_cannot_be_filled(ranks, llama, trained):
    (targets,) = ranks[1].run(describe, llama, 1)
    (message,) = ranks[1].run(error_of_filling_offloaded, llama, targets, trained)
    assert message == "the model is offloaded: call onload() before using it"


def test_a_policy_is_no_source_of_a_value_model(ranks, llama, trained, tmp_path):
    path = tiny_models.save_model(tmp_path)
    (sources,) = ranks[1].run(describe_policy, path)
    (message,) = ranks[1].run(error_of_planning, llama, sources)
    assert "output_layer.weight: score.weight[0:1, 0:32]" in message


# ---- on the ranks -------------------------------------------------------------------------------


def rows_of_rank(module):
    """Of every group of 4 rows, which one step takes, this rank's share; with `values`."""
    per_step = 4 // module.data_parallel_size
    mine = [row for row in range(8) if row % 4 // per_step == module.data_parallel_rank]
    rows = {key: value[mine] for key, value in tiny_models.batch_with_returns().items()}
    return {**rows, "values": module.compute_values(rows)}


def score(path, **settings):
    with built(Critic, path, trainable=False, **settings) as module:
        return module.forward_step(tiny_models.batch())


def train(path, **settings):
    with built(Critic, path, **settings) as module:
        return module.train(rows_of_rank(module))


def error_of_training(path, kind, with_returns=False):
    with built(kind, path) as module:
        try:
            module.train(rows_of_rank(module) if with_returns else tiny_models.batch())
        except (ValueError, NotImplementedError) as error:
            return str(error)


def train_and_export(path, **settings):
    with built(Critic, path, **settings) as module:
        module.train(rows_of_rank(module))
        shards = module.weight_shards()
        module.plan_weight_sync(shards, shards, colocated(2, 2, 2), {})  # a sync needs some plan
        return {
            "shards": shards,
            "weights": {name: p.clone() for name, p in module.local_parameters().items()},
            "export": module.export_weights(),
            "values": module.compute_values(tiny_models.batch()),
        }


def send(trained, targets, ranks_per_replica):
    """What the trained ranks say that they sent, and the fingerprints of their plans."""
    sources = trained[0]["shards"]
    links = colocated(sources.num_ranks, targets.num_ranks, ranks_per_replica)
    sent, fingerprints = [], {}
    for rank, one in enumerate(trained):
        tensors = OpenedExport(one["export"]).tensors
        sender = WeightSender(rank, lambda tensors=tensors: tensors, lambda: 0)
        fingerprints[rank] = sender.plan(sources, targets, links)
        sent.append(sender.sent())
    return sent, fingerprints


def describe(path, num_replicas, **settings):
    with built(Critic, path, trainable=False, **settings) as module:
        return module.weight_shards(num_replicas)


def describe_policy(path):
    with built(Scorer, path) as module:
        return module.weight_shards()


def receive(path, targets, trained, sent, first_rank, **settings):
    """On a rank of a frozen replica: plan, copy, declare complete, use, revoke."""
    with built(Critic, path, trainable=False, **settings) as module:
        sources, rank = trained[0]["shards"], first_rank + module.rank
        links = colocated(sources.num_ranks, targets.num_ranks, module.world_size)
        plan = module.plan_weight_sync(rank, sources, targets, links)
        needed = tuple(sorted(plan.fingerprints))
        before = module.forward_step(tiny_models.batch())["values"]
        exports = [trained[source]["export"] for source in needed]
        module.import_weights(needed, False, EVERYTHING, *exports)
        in_between = error_of_scoring(module)
        arrival = module.finish_weight_sync(5, needed, *(sent[source] for source in needed))
        values = module.forward_step(tiny_models.batch())["values"] if arrival.is_good else None
        module.revoke_weight_sync(4)  # of another version: nothing happens
        assert (error_of_scoring(module) is None) == arrival.is_good
        module.revoke_weight_sync(5)
        return {
            "plan": plan.fingerprints,
            "layouts": targets.rank_layouts(rank),
            "weights": {name: p.clone() for name, p in module.local_parameters().items()},
            "arrival": arrival,
            "values_before": before,
            "values": values,
            "error_in_between": in_between,
            "error_after_revoke": error_of_scoring(module),
        }


def sync_over_a_link(path, directory):
    """The first rank is a trainer of its own, the second one a frozen model; weights after it."""
    is_trainer = os.environ.pop("RANK") == "0"
    os.environ["WORLD_SIZE"] = "1"
    try:
        with built(Critic, path, trainable=is_trainer) as module:
            if is_trainer:
                module.train(rows_of_rank(module))
            (send_over_a_link if is_trainer else receive_over_a_link)(module, directory)
            return {name: p.clone() for name, p in module.local_parameters().items()}
    finally:
        os.environ["RANK"] = "0" if is_trainer else "1"


def send_over_a_link(module, directory):
    shards = module.weight_shards()
    module.plan_weight_sync(shards, ReplicatedShards(shards, 1), TWO_HOSTS, {})
    port = module.listen_for_weight_links()
    leave(directory / "for_receiver", (shards, port))
    module.connect_weight_links([LinkAddress(0, "0 -> 0", "127.0.0.1", port)])
    module.send_weights()
    leave(directory / "sent", module.sent_weights(EVERYTHING))


def receive_over_a_link(module, directory):
    sources, port = take_when_there(directory / "for_receiver")
    plan = module.plan_weight_sync(0, sources, module.weight_shards(1), TWO_HOSTS)
    assert plan.num_elements[LinkKind.NETWORK] > 0
    module.connect_weight_links([LinkAddress(0, "0 -> 0", "127.0.0.1", port)])
    module.import_weights((), False, EVERYTHING)
    arrival = module.finish_weight_sync(1, (0,), take_when_there(directory / "sent"))
    assert arrival.is_good, arrival


def leave(path, value):
    """Write a value that the other process waits for."""
    torch.save(value, path.with_suffix(".tmp"))
    path.with_suffix(".tmp").rename(path)


def take_when_there(path):
    deadline = time.monotonic() + 60
    while not path.exists():
        assert time.monotonic() < deadline, path
        time.sleep(0.01)
    return torch.load(path, weights_only=False)


def error_of_scoring(module):
    try:
        module.forward_step(tiny_models.batch())
    except RuntimeError as error:
        return str(error)


def error_of_planning(path, sources):
    with built(Critic, path, trainable=False) as module:
        targets = module.weight_shards(1)
        try:
            module.plan_weight_sync(0, sources, targets, colocated(1, 1, 1))
        except IncompletePlanError as error:
            return str(error)


def error_of_filling_offloaded(path, targets, trained):
    with built(Critic, path, trainable=False, offload_weights=True) as module:
        sources = trained[0]["shards"]
        module.plan_weight_sync(0, sources, targets, colocated(2, 1, 1))
        module.offload()
        try:
            module.import_weights((0, 1), False, EVERYTHING, *(one["export"] for one in trained))
        except RuntimeError as error:
            return str(error)


def logical_tensors(model, ranks):
    """Whole tensors by their Hugging Face names, from (layouts, weights) of each rank."""
    whole = {
        name: torch.full(model.tensor_shape(name), float("nan")) for name in model.tensor_names()
    }
    for layouts, weights in ranks:
        for layout in layouts:
            for block in layout.blocks:
                logical, local = (
                    tuple(slice(*bounds) for bounds in rect)
                    for rect in (block.logical, block.local)
                )
                whole[block.tensor][logical] = weights[layout.name][local]
    return whole
