"""Are the arguments of the installed libraries read, and read without importing them?"""

import dataclasses
import importlib.util
import subprocess
import sys
import typing

from chatlearn_vllm.config import upstream_fields as upstream


def test_fields_are_those_of_the_installed_classes():
    from megatron.core.transformer import TransformerConfig

    fields = upstream.upstream_fields()
    names = {field.name for field in dataclasses.fields(TransformerConfig)}
    assert fields["transformer_args"] == {name for name in names if not name.startswith("_")}
    assert {"enable_chunked_prefill", "kv_cache_memory_bytes", "quantization"} <= fields[
        "engine_args"
    ]
    assert {"min_tokens", "stop_token_ids", "logit_bias"} <= fields["sampling_args"]
    assert not any(name.startswith("_") for names in fields.values() for name in names)


def test_types_and_names_are_those_of_the_installed_libraries():
    from megatron.core.transformer import TransformerConfig
    from vllm import EngineArgs, SamplingParams
    from vllm.model_executor.layers.quantization import QUANTIZATION_METHODS
    from vllm.model_executor.model_loader import LoadFormats

    defaults = {"engine_args": EngineArgs, "sampling_args": SamplingParams(),
                "transformer_args": TransformerConfig}  # fmt: skip
    scalars = upstream.upstream_scalars()
    assert scalars.keys() == defaults.keys()
    for target, kinds in scalars.items():
        given = {name: getattr(defaults[target], name, None) for name in kinds}
        known = {name: default for name, default in given.items() if default is not None}
        assert len(known) > 15
        wrong = {name for name, default in known.items() if type(default) is not kinds[name]}
        assert all(kinds[name] is float and type(known[name]) is int for name in wrong)
    assert scalars["engine_args"]["trust_remote_code"] is bool
    assert upstream.upstream_names("quantization") == tuple(QUANTIZATION_METHODS)
    assert upstream.upstream_names("load_format") == typing.get_args(LoadFormats)


def test_choices_are_those_of_vllm():
    from vllm.engine import arg_utils

    def allowed(annotation) -> list:
        if typing.get_origin(annotation) is typing.Literal:
            parts = typing.get_args(annotation)
            return [one for part in parts for one in (allowed(part) or [part])]
        return [one for part in typing.get_args(annotation) for one in allowed(part)]

    choices = upstream.engine_choices()
    assert {"kv_cache_dtype", "runner", "logprobs_mode", "moe_backend"} <= choices.keys()
    for name, values in choices.items():
        annotation = arg_utils.EngineArgs.__annotations__[name]
        kind = eval(annotation, vars(arg_utils)) if isinstance(annotation, str) else annotation
        assert list(values) == allowed(kind), name


def test_only_what_transformers_reads_passes_through_without_the_libraries(monkeypatch):
    installed = upstream.upstream_fields()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    fields = upstream.upstream_fields.__wrapped__()
    assert fields == upstream.FIELDS_WITHOUT_VLLM
    assert fields.keys() == installed.keys()
    assert all(fields[target] <= installed[target] for target in fields)


def test_config_and_job_import_and_load_without_heavy_libraries(job):
    code = f"""
import sys
import chatlearn_vllm.config, chatlearn_vllm.job
from chatlearn_vllm.config import load_config
load_config({str(job)!r}, ["models.policy.model_args.min_tokens=1"])
print([name for name in ("torch", "ray", "vllm", "megatron") if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
