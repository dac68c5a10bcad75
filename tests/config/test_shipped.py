"""Do all yaml files of the repository load, and do the documented keys match the schema?"""

from pathlib import Path

import pytest
import yaml

from chatlearn_vllm.config import load_config
from chatlearn_vllm.config.loader import keys_of
from chatlearn_vllm.config.model_args import ModelArgs
from chatlearn_vllm.config.reference import with_tables
from chatlearn_vllm.config.schema import ModelConfig, RuntimeConfig, RuntimeEnvConfig

ROOT = Path(__file__).parents[2]
STRATEGIES = ROOT / "configs/strategies"  # see strategies/test_whole_files.py
YAML_FILES = sorted(set((ROOT / "configs").rglob("*.yaml")) - set(STRATEGIES.glob("*.yaml")))


def is_job(path: Path) -> bool:
    """Whether a shipped file is a job; the others are files of a model or included by one."""
    return "models" in yaml.safe_load(path.read_text())


@pytest.mark.parametrize("path", [*filter(is_job, YAML_FILES)], ids=lambda path: path.name)
def test_shipped_jobs_load_on_their_defaults(path):
    job = load_config(path)
    assert job.notices == ()
    assert job.runtime.entry_script


@pytest.mark.parametrize(
    "path", [path for path in YAML_FILES if not is_job(path)], ids=lambda path: path.name
)
def test_shipped_model_files_load(path, write):
    job = write("job.yaml", f"models: {{m: {{num_gpu: 1, model_config_file: {path}}}}}\n")
    assert load_config(job).models["m"].model_args.model_fields_set


def test_the_demo_colocates_two_rollout_replicas_with_two_trainer_ranks():
    job = load_config(ROOT / "configs/llama2/grpo.yaml")
    assert job.models["policy"].num_replica == 2
    assert job.models["policy_trainer"].data_parallel_size == 2
    assert job.runtime.colocation_groups() == (("policy", "policy_trainer"),)


def test_policy_reference_and_trainer_have_one_temperature(monkeypatch):
    monkeypatch.setenv("temperature", "0.7")
    for name in ("grpo_kl", "online_dpo", "rlhf", "vllm_rlhf"):
        models = load_config(ROOT / f"configs/llama2/{name}.yaml").models
        of_policies = ("policy", "reference", "policy_trainer", "ppo_policy")
        assert {
            models[model].model_args.temperature for model in of_policies if model in models
        } == {0.7}


def test_the_tables_in_the_documentation_are_up_to_date():
    path = ROOT / "docs/configuration.md"
    document = path.read_text(encoding="utf-8")
    assert document == with_tables(document), (
        f"run: python -m chatlearn_vllm.config.reference {path.relative_to(ROOT)}"
    )


@pytest.mark.parametrize(
    "section", [RuntimeEnvConfig, ModelConfig, RuntimeConfig, ModelArgs], ids=lambda s: s.__name__
)
def test_every_key_is_documented(section):
    fields = {field.alias or name: field for name, field in section.model_fields.items()}
    assert [key for key in keys_of(section) if not fields[key].description] == []
