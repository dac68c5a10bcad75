"""What do templates and defaults in a strategy file stand for?"""

import pytest

from chatlearn_vllm.config import load_config
from tests.config.strategy_job import JOB, args_of, problems_of


def test_templates_stand_for_keys_and_for_the_environment(job, write, monkeypatch):
    monkeypatch.setenv("FROM_ENV", "33")
    monkeypatch.setenv("response_length", "99")  # a key of the file: that wins
    text = JOB.replace("temperature: 0.9", "temperature: 0.9, seed_: 1").replace(", seed_: 1", "")
    path = write(
        "job.yaml",
        "exp_name: run-${response_length}-${FROM_ENV}\n"
        "logging_steps: ${FROM_ENV}\n"
        "output_dir: ${NOT_SET:/o/${actor_train.data_args.file_name}}\n"
        "save_steps: ${oc.env:NOT_SET,7}\n"
        "eval_steps: ${oc.env:FROM_ENV}\n"
        "reference: {model_args: '${actor_infer.model_args}', strategy_args: {strategy_name: "
        "megatron_infer, strategy_config: {sequence_parallel: '${.use_distributed_optimizer}', "
        "use_distributed_optimizer: False}}, device_mapping: '${..actor_train.device_mapping}'}\n"
        "use_kl_loss: True\nkl_loss_coef: 0.1\n" + text,
    )
    loaded = load_config(path, ["actor_infer.model_args={dtype: fp16}", "prompt_length=41"])
    runtime = loaded.runtime
    assert (runtime.exp_name, runtime.log_interval) == ("run-24-33", 33)
    assert (runtime.output_dir, runtime.save_episode_interval) == ("/o/train.jsonl", 7)
    reference = loaded.models["reference"]
    assert reference.model_args.dtype == "float16"
    assert reference.device_mapping == (0, 1, 2, 3)
    assert reference.model_args.use_distributed_optimizer is False


@pytest.mark.parametrize(
    ("text", "rule"),
    [
        (
            "${response_lenght}",
            "the file has no key response_lenght; did you mean response_length?",
        ),
        ("${nothing.like.it}", "the file has no key nothing.like.it, nor is there such a variable"),
        ("${exp_name}", "keys stand for each other: exp_name -> exp_name"),
        ("a${actor_train}", "${actor_train} is a map or list inside a text"),
        ("${oc.env:NOT_SET}", "environment variable NOT_SET is not set and there is no default"),
        ("${a b}", "${a b} is neither the name of a key nor"),
        ("${....x}", "leads out of the file"),
        ("run-${now:%Y-%m-%d}", "${now:...} is not computed here: Hydra does not run the job; "
         "write the value, or ${NAME:default} with an environment variable"),
        ("${hydra:runtime.cwd}", "${hydra:...} is not computed here"),
        ("${eval: 10*4}", "${eval:...} is not computed here"),
        ("${oc.select:seed,5}", "${oc.select:...} is not computed here"),
        ("${oc.decode:${oc.env:NOT_SET}}", "${oc.decode:...} is not computed here"),
        ("${open", "a template ${ has no closing brace"),
        ("${" * 3000 + "}" * 3000, "templates are nested too deep"),
    ],
)  # fmt: skip
def test_a_template_that_stands_for_nothing_is_named(write, monkeypatch, text, rule):
    monkeypatch.delenv("NOT_SET", raising=False)
    path = write("job.yaml", f"exp_name: '{text}'\n{JOB}")
    (line,) = problems_of(path)
    assert line.startswith(f"job.yaml: exp_name={text!r}"[:300]) and rule in line


def test_what_hydra_would_fill_in_for_itself_is_left_alone(write):
    path = write("job.yaml", f"hydra: {{run: {{dir: '${{now:%Y}}/${{nowhere}}'}}}}\n{JOB}")
    (notice,) = load_config(path).notices
    assert "no effect of hydra (Hydra does not run the job)" in notice


def test_defaults_are_laid_below_the_file_or_where_it_says(write):
    write("base.yaml", JOB + "max_steps: 1\nsave_steps: 1\n")
    write("steps/long.yaml", "max_steps: 9\nsave_steps: 9\n")
    path = write("a.yaml", "defaults: [base, steps/long@_here_]\nsave_steps: 2\n")
    runtime = load_config(path).runtime
    assert (runtime.num_episode, runtime.save_episode_interval) == (9, 2)
    path = write("b.yaml", "defaults: [_self_, base]\nsave_steps: 2\n")
    assert load_config(path).runtime.save_episode_interval == 1
    write("training_args/fast.yaml", "learning_rate: 1e-3\n")
    path = write("c.yaml", "defaults: [base, {training_args@actor_train.training_args: fast}]\n")
    assert args_of(path, model="policy_trainer").lr == 1e-3


def test_defaults_in_a_circle_are_refused(write):
    write("base.yaml", "defaults: [job]\n")
    path = write("job.yaml", f"defaults: [base]\n{JOB}")
    assert problems_of(path) == ["base.yaml: defaults='job': files name each other in a circle"]


def test_files_of_defaults_that_are_not_there_are_named(write):
    path = write("job.yaml", f"defaults: [../config/deepspeed_zero3@_here_]\n{JOB}")
    loaded = load_config(path)
    assert "nothing is taken from them: ../config/deepspeed_zero3.yaml" in loaded.notices[0]
    (line,) = problems_of(path, ["exp_name=${deepspeed_zero3}"])
    assert "not found were, from its defaults: ../config/deepspeed_zero3" in line
    (line,) = problems_of(write("job.yaml", f"defaults: [3]\n{JOB}"))
    assert "job.yaml: defaults=3: must be the name of a file, or {group: name}" in line
