"""Do the devices that a job names make whole replicas, and is it clear who shares them?"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from chatlearn_vllm.config.devices import uneven_replicas

if TYPE_CHECKING:
    from chatlearn_vllm.config.checks import Reporter
    from chatlearn_vllm.config.problems import Key
    from chatlearn_vllm.config.schema import JobConfig, ModelConfig


def check_replicas(model: ModelConfig, report: Reporter) -> bool:
    """Check that a model's devices are a multiple of what one replica takes; whether they are."""
    at: Key = ("models", model.name)
    sizes = [(*at, "tensor_model_parallel_size"), (*at, "pipeline_model_parallel_size")]
    sizes += [(*at, "model_args", size[-1]) for size in sizes]
    tp, pp = model.tensor_model_parallel_size, model.pipeline_model_parallel_size
    names = ("tensor_model_parallel_size", "pipeline_model_parallel_size")
    divides = model.num_gpu % (tp * pp) == 0
    if model.device_mapping is None:
        rule = f"must be a multiple of {' x '.join(names)} = {tp} x {pp}"
        report.require(divides, (*at, "num_gpu"), rule, given=sizes)
    else:
        rule = uneven_replicas(model.device_mapping, dict(zip(names, (tp, pp), strict=True)))
        report.require(rule is None, (*at, "device_mapping"), rule or "", given=sizes)
    return divides


def check_device_mappings(job: JobConfig, report: Reporter) -> None:
    """Check the numbers of all device_mappings, and that nothing else says who shares devices."""
    mapped = [name for name, model in job.models.items() if model.device_mapping is not None]
    for model in job.models.values():
        key: Key = ("models", model.name, "device_mapping")
        devices = model.device_mapping
        if devices is None:
            report.require(
                not mapped or not model.num_gpu,
                ("models", model.name, "num_gpu"),
                f"needs a device_mapping, too, as models.{mapped[0] if mapped else ''} has one",
                given=[key],
            )
            continue
        report.require(bool(devices), key, "names no device; leave it out for a model on CPUs")
        report.require(all(device >= 0 for device in devices), key, "devices count from 0")
        twice = sorted(device for device, count in Counter(devices).items() if count > 1)
        report.require(not twice, key, f"names device {', '.join(map(str, twice))} more than once")
        report.require(
            model.num_gpu == len(devices),
            ("models", model.name, "num_gpu"),
            f"device_mapping names {len(devices)} devices; leave num_gpu out",
        )
    report.require(
        not mapped or not job.runtime.colocation,
        ("runtime", "colocation"),
        f"leave it out: who shares devices follows from device_mapping, which models."
        f"{mapped[0] if mapped else ''} has",
    )
