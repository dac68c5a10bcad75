"""Training goes on after a resume as if it had never stopped, also on other ranks."""

import importlib.util
import multiprocessing
import os
import random
import re
import resource
import shutil
import signal
import threading

import numpy as np
import pytest
import torch
from torch.distributed.checkpoint.api import CheckpointException

from chatlearn_vllm.engines.megatron import checkpoint, checkpoint_files
from chatlearn_vllm.engines.megatron.background_writer import BackgroundWriter
from tests.helpers.ranks import Ranks
from tests.megatron import tiny_models

OVERLAP = {"overlap_grad_reduce": True, "overlap_param_gather": True}


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return tiny_models.save_model(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def without_stop(ranks, llama):
    """[loss, grad_norm] of steps 0 to 4 in one go."""
    return ranks[1].run(train_and_save, llama, None, steps=5)[0]


@pytest.fixture(scope="module")
def saved_by_two(ranks, llama, tmp_path_factory):
    """Checkpoint of two data parallel ranks after two steps."""
    directory = tmp_path_factory.mktemp("dp2")
    ranks[2].run(train_and_save, llama, directory, steps=2)
    return directory


@pytest.mark.parametrize(
    ("world_size", "settings"),
    [
        (1, {}),
        (2, {}),
        (2, {"pp": 2, "vpp": 2}),
        (4, {"tp": 2, "pp": 2, "sequence_parallel": True}),
    ],
)
def test_resume_on_other_ranks_continues_the_curve(
    ranks, llama, saved_by_two, without_stop, world_size, settings
):
    # three further steps: a wrong Adam step count shows in the second one
    for iteration, curve in ranks[world_size].run(resume, llama, saved_by_two, **settings):
        assert iteration == 2
        assert np.allclose(curve, without_stop[2:], rtol=2e-4), f"{curve}\n{without_stop[2:]}"


@pytest.mark.parametrize(
    "settings",
    [
        {"tp": 2, "pp": 2},
        {"use_distributed_optimizer": False, "tp": 2},
        {"dtype": "bfloat16", "tp": 2},
        {**OVERLAP, "bucket_size": 3000},
        {**OVERLAP, "pp": 2},
    ],
)
def test_resume_on_the_same_ranks_continues_the_curve(ranks, llama, tmp_path, settings):
    expected = ranks[4].run(train_and_save, llama, None, steps=5, **settings)[0][2:]
    ranks[4].run(train_and_save, llama, tmp_path, steps=2, **settings)
    for _, curve in ranks[4].run(resume, llama, tmp_path, **settings):
        assert np.allclose(curve, expected, rtol=1e-5), f"{curve}\n{expected}"


def test_tied_embeddings_on_two_stages_are_resumed_on_the_same_and_on_other_ranks(ranks, tmp_path):
    tied = tiny_models.save_model(tmp_path / "model", "qwen2", tie_word_embeddings=True)
    for settings in ({}, {"vpp": 2}):  # the embedding has a gradient bucket of its own
        directory = tmp_path / f"saved{len(settings)}"
        steps = ranks[4].run(train_save_and_train, tied, directory, pp=2, **settings)[0]
        for _, curve in ranks[4].run(resume, tied, directory, pp=2, **settings):
            assert curve == steps
        ((_, curve),) = ranks[1].run(resume, tied, directory)
        assert np.allclose(curve, steps, rtol=2e-4), f"{curve}\n{steps}"


def test_each_parameter_has_its_own_step_count_after_a_resume(ranks, llama, saved_by_two):
    assert ranks[2].run(step_counts_after_resume, llama, saved_by_two) == [{3.0}, {3.0}]


def test_several_gradient_buckets_are_resumed_on_other_ranks(ranks, llama, tmp_path):
    several = {**OVERLAP, "bucket_size": 3000}
    steps = ranks[4].run(train_save_and_train, llama, tmp_path, pp=2, **several)[0]
    for world_size, settings in ((1, {}), (4, {"tp": 2, **several})):
        for _, curve in ranks[world_size].run(resume, llama, tmp_path, **settings):
            assert np.allclose(curve, steps, rtol=2e-4), f"{curve}\n{steps}"


def test_another_kind_of_optimizer_is_refused(ranks, llama, saved_by_two):
    settings = {"use_distributed_optimizer": False}
    (message,) = ranks[1].run(error_of_loading, llama, saved_by_two, **settings)
    assert "set it so (it is False)" in message


def test_no_checkpoint_is_no_error_unless_asked_for(ranks, llama, tmp_path):
    assert ranks[1].run(resume, llama, tmp_path, steps=0) == [(None, [])]
    (message,) = ranks[1].run(error_of_loading, llama, tmp_path, iteration=7)
    assert "iter_0000007: no complete checkpoint there" in message


@pytest.fixture(scope="module")
def saved_twice(ranks, llama, tmp_path_factory):
    """Checkpoints 1 and 2 of two pipeline stages, and the step after the first of them."""
    directory = tmp_path_factory.mktemp("twice")
    return directory, ranks[2].run(save_between_steps, llama, directory, pp=2)[0]


def truncate(path):
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size - 2)


def flip_a_bit(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("name", "damage", "message"),
    [
        ("__1_0.distcp", truncate, "__1_0.distcp has .* bytes, .* were written"),
        ("rng_00000.pt", flip_a_bit, "rng_00000.pt has other content than was written"),
        ("rng_00001.pt", os.remove, "rng_00001.pt is missing"),
        ("chatlearn.json", truncate, "chatlearn.json: is not JSON"),
    ],
)
def test_damaged_files_are_named_with_what_can_be_loaded_instead(
    ranks, llama, saved_twice, tmp_path, name, damage, message
):
    shutil.copytree(saved_twice[0], tmp_path / "copy")
    damage(tmp_path / "copy" / "iter_0000002" / name)
    for error in ranks[2].run(error_of_loading, llama, tmp_path / "copy", pp=2):
        assert re.search(f"iter_0000002: .*{message}", error), error
        assert "Complete: 1; runtime.load_data_checkpoint_iteration: 1 goes on from there" in error


def test_a_rank_killed_while_saving_leaves_the_earlier_checkpoint_to_go_on_from(
    ranks, llama, saved_twice, tmp_path
):
    directory, (expected,) = saved_twice
    shutil.copytree(directory / "iter_0000001", tmp_path / "iter_0000001")
    (tmp_path / "latest").write_text("iter_0000001\n")
    victims = Ranks(2)
    try:
        with pytest.raises(EOFError):  # the killed rank's end of its pipe
            victims.run(resume_and_die_while_saving, llama, tmp_path, pp=2)
    finally:
        victims.close()
    unfinished = tmp_path / ".iter_0000002.writing"
    assert list(unfinished.glob("*.distcp")) and not (unfinished / "chatlearn.json").exists()
    for iteration, (step,) in ranks[2].run(resume_and_save, llama, tmp_path, pp=2):
        assert iteration == 1 and step == expected
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "iter_0000001", "iter_0000002", "latest",
    ]  # fmt: skip
    assert checkpoint_files.problems(tmp_path / "iter_0000002") == []


def test_latest_names_the_newest_complete_checkpoint(ranks, llama, tmp_path):
    assert ranks[1].run(save_twice_then_fail, llama, tmp_path) == ["disk full"]
    assert (tmp_path / "latest").read_text() == "iter_0000002\n"
    names = sorted(path.name for path in tmp_path.iterdir() if not path.name.startswith("."))
    assert names == ["iter_0000001", "iter_0000002", "latest"]


def test_what_is_saved_in_the_background_is_what_was_there_when_the_save_began(
    ranks, llama, tmp_path
):
    now, later = tmp_path / "now", tmp_path / "later"
    # with the distributed optimizer megatron-core makes copies of its own
    settings = {"tp": 2, "use_distributed_optimizer": False}
    ranks[2].run(save_in_the_background_of_a_step, llama, now, later, **settings)
    names = sorted(path.name for path in now.glob("iter_*/*"))
    assert names == sorted(path.name for path in later.glob("iter_*/*"))
    for path in now.glob("iter_0000001/*"):
        if path.suffix in (".distcp", ".pt"):
            other = later / "iter_0000001" / path.name
            assert path.read_bytes() == other.read_bytes(), path.name
    assert (later / "latest").read_text() == "iter_0000002\n"
    assert [checkpoint_files.problems(later / f"iter_000000{n}") for n in (1, 2)] == [[], []]
    one, two = (later / f"iter_000000{n}" / "__0_0.distcp" for n in (1, 2))
    assert one.read_bytes() != two.read_bytes()


def test_a_failure_in_the_background_is_raised_on_all_ranks_with_its_rank(ranks, llama, tmp_path):
    for message in ranks[2].run(error_of_saving_in_the_background, llama, tmp_path, tp=2):
        assert re.search("could not be written: rank 1: .*OSError: disk full", message, re.DOTALL)
        assert "rank 0" not in message
    assert [path.name for path in tmp_path.iterdir()] == [".iter_0000001.writing"]


def test_files_that_cannot_be_written_are_told_on_all_ranks_with_directory_and_rank(
    ranks, llama, tmp_path
):
    for message in ranks[2].run(error_of_saving_without_room, llama, tmp_path, tp=2):
        assert f"could not be written in {tmp_path}/.iter_0000001.writing:\nrank 1: " in message
        assert re.search(r"[\d.]+ MiB are free there", message) and "rank 0" not in message


def test_why_files_could_not_be_written_is_told_where_the_directory_is_gone(ranks, llama, tmp_path):
    (message,) = ranks[1].run(error_of_a_directory_that_is_gone, llama, tmp_path / "gone")
    assert f"could not be written in {tmp_path}/gone:\nrank 0: OSError('lost')\n" in message
    assert "it cannot be looked at from rank 0: [Errno 2]" in message


def test_saving_leaves_no_process_behind(ranks, llama, tmp_path):
    assert ranks[2].run(processes_after_save, llama, tmp_path) == [0, 0]


def test_random_numbers_go_on_after_a_resume(ranks, llama, tmp_path):
    expected = ranks[2].run(random_numbers_after_save, llama, tmp_path, pp=2)
    assert ranks[2].run(random_numbers_after_load, llama, tmp_path, pp=2) == expected


def test_a_resumed_job_follows_the_learning_rate_of_its_yaml(ranks, llama, saved_by_two):
    settings = {"lr_decay_style": "linear", "lr": 0.1, "lr_decay_iters": 10}
    (rate,) = ranks[1].run(learning_rate_after_resume, llama, saved_by_two, **settings)
    assert rate == pytest.approx(0.1 * (1 - 3 / 10))


@pytest.mark.parametrize("is_distributed", [True, False])
def test_a_resumed_job_follows_the_betas_and_epsilon_of_its_yaml(
    ranks, llama, tmp_path, is_distributed
):
    settings = {"use_distributed_optimizer": is_distributed}
    ranks[2].run(train_and_save, llama, tmp_path, steps=1, **settings)
    settings |= {"adam_beta1": 0.5, "adam_beta2": 0.75, "adam_eps": 1e-3}
    for found in ranks[2].run(betas_and_epsilon_after_resume, llama, tmp_path, **settings):
        assert found == {(0.5, 0.75, 1e-3)}


def test_missing_psutil_is_said_instead_of_hanging(monkeypatch, tmp_path):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "psutil" else find_spec(name)
    )
    with pytest.raises(ValueError, match="pip install psutil"):
        checkpoint.UnfinishedSave(tmp_path, 1, None, None, None, in_background=False)


def train_and_save(path, directory, steps, **settings):
    with tiny_models.engine(path, **settings) as engine:
        curve = tiny_models.train(engine, steps)
        if directory is not None:
            engine.save_checkpoint(directory, steps)
        return curve


def train_save_and_train(path, directory, **settings):
    with tiny_models.engine(path, **settings) as engine:
        tiny_models.train(engine, 2)
        engine.save_checkpoint(directory, 2)
        return tiny_models.train(engine, 3)


def resume(path, directory, steps=3, **settings):
    with tiny_models.engine(path, **settings) as engine:
        iteration = engine.load_checkpoint(directory)
        return iteration, tiny_models.train(engine, steps)


def save_between_steps(path, directory, **settings):
    with tiny_models.engine(path, **settings) as engine:
        tiny_models.train(engine, 1)
        engine.save_checkpoint(directory, 1)
        curve = tiny_models.train(engine, 1)
        engine.save_checkpoint(directory, 2)
        return curve


def resume_and_save(path, directory, **settings):
    with tiny_models.engine(path, **settings) as engine:
        iteration = engine.load_checkpoint(directory)
        curve = tiny_models.train(engine, 1)
        engine.save_checkpoint(directory, iteration + 1)
        return iteration, curve


def resume_and_die_while_saving(path, directory, **settings):
    def die(directory):
        os.kill(os.getpid(), signal.SIGKILL)

    # Rank 0 calls it when every other file of the checkpoint is there.
    checkpoint_files.describe_files = die
    resume_and_save(path, directory, **settings)


def step_counts_after_resume(path, directory):
    with tiny_models.engine(path) as engine:
        engine.load_checkpoint(directory)
        tiny_models.train(engine, 1)
        (part,) = engine.optimizer.chained_optimizers
        return {float(state["step"]) for state in part.optimizer.state.values()}


def error_of_loading(path, directory, iteration=None, **settings):
    with tiny_models.engine(path, **settings) as engine:
        try:
            engine.load_checkpoint(directory, iteration)
        except ValueError as error:
            return str(error)


def save_twice_then_fail(path, directory):
    with tiny_models.engine(path) as engine:
        for iteration in (1, 2):
            engine.save_checkpoint(directory, iteration)

        def fail():
            raise OSError("disk full")

        original, checkpoint._random_state = checkpoint._random_state, fail
        try:
            engine.save_checkpoint(directory, 3)
        except OSError as error:
            return str(error)
        finally:
            checkpoint._random_state = original


def save_in_the_background_of_a_step(path, now, later, **settings):
    released = threading.Event()
    write_file = BackgroundWriter._write_file

    def held_back(self, number):
        assert released.wait(60)
        return write_file(self, number)

    BackgroundWriter._write_file = held_back
    try:
        with tiny_models.engine(path, **settings) as engine:
            tiny_models.train(engine, 1)
            engine.save_checkpoint(now, 1)
            engine.save_checkpoint(later, 1, in_background=True)
            tiny_models.train(engine, 1)
            engine.offload()
            engine.onload()
            assert not engine.is_checkpoint_written
            assert not (later / "iter_0000001").exists()
            released.set()
            engine.save_checkpoint(later, 2, in_background=True)
            assert (later / "iter_0000001").exists()
            engine.finish_checkpoint()
            engine.save_checkpoint(now, 2)
    finally:
        BackgroundWriter._write_file = write_file


def error_of_saving_in_the_background(path, directory, **settings):
    def fail(self, number):
        raise OSError("disk full")

    write_file = BackgroundWriter._write_file
    try:
        with tiny_models.engine(path, **settings) as engine:
            if torch.distributed.get_rank() == 1:
                BackgroundWriter._write_file = fail
            engine.save_checkpoint(directory, 1, in_background=True)
            try:
                engine.finish_checkpoint()
            except RuntimeError as error:
                return str(error)
    finally:
        BackgroundWriter._write_file = write_file


def error_of_saving_without_room(path, directory, **settings):
    """The second rank may write small files only."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        with tiny_models.engine(path, **settings) as engine:
            if torch.distributed.get_rank() == 1:
                resource.setrlimit(resource.RLIMIT_FSIZE, (2**12, before[1]))
            try:
                engine.save_checkpoint(directory, 1)
            except RuntimeError as error:
                return str(error)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def error_of_a_directory_that_is_gone(path, directory):
    with tiny_models.engine(path):  # which has the ranks talk to each other
        try:
            with checkpoint._failures_told_on_all_ranks(directory):
                raise CheckpointException("write", {0: (OSError("lost"), None)})
        except RuntimeError as error:
            return str(error)


def processes_after_save(path, directory):
    with tiny_models.engine(path) as engine:
        for iteration in (1, 2):
            engine.save_checkpoint(directory, iteration)
        return len(multiprocessing.active_children())


def random_numbers():
    from megatron.core.tensor_parallel import get_cuda_rng_tracker

    from chatlearn_vllm.engines.megatron.cpu import cuda_means_cpu

    with cuda_means_cpu(), get_cuda_rng_tracker().fork():
        forked = float(torch.rand(()))
    return random.random(), float(np.random.random()), float(torch.rand(())), forked


def random_numbers_after_save(path, directory, **settings):
    with tiny_models.engine(path, **settings) as engine:
        random_numbers()
        engine.save_checkpoint(directory, 1)
        return random_numbers()


def random_numbers_after_load(path, directory, **settings):
    with tiny_models.engine(path, **settings) as engine:
        engine.load_checkpoint(directory)
        return random_numbers()


def betas_and_epsilon_after_resume(path, directory, **settings):
    """Of all groups with parameters that the update itself sees."""
    with tiny_models.engine(path, **settings) as engine:
        engine.load_checkpoint(directory)
        tiny_models.train(engine, 1)
        groups = engine.optimizer.chained_optimizers[0].optimizer.param_groups
        return {(*group["betas"], group["eps"]) for group in groups if group["params"]}


def learning_rate_after_resume(path, directory, **settings):
    with tiny_models.engine(path, **settings) as engine:
        engine.load_checkpoint(directory)
        micro_batches = tiny_models.micro_batches(tiny_models.batch())
        return engine.train_step(micro_batches, tiny_models.negative_logprobs)[0]["lr"]
