"""Which GPUs does the benchmark take CUDA to see?"""

from types import SimpleNamespace

import pytest

from chatlearn_vllm.bench import machine
from chatlearn_vllm.bench.cases import OptionError
from chatlearn_vllm.bench.machine import this_machine, visible_devices

A, B, C = "GPU-1aaaaaaa-0000", "GPU-1bbbbbbb-1111", "GPU-2ccccccc-2222"
PART = "MIG-7ddddddd-3333"


@pytest.mark.parametrize(
    ("variable", "expected"),
    [
        (None, [A, B, C]),
        ("", []),
        ("-1", []),
        ("2,0", [C, A]),
        (" 1 , 2 ", [B, C]),
        ("0,-1,1", [A]),
        ("0,7,1", [A]),
        ("0,,1", [A]),
        ("1gpu,0", [B, A]),
        ("GPU-1a,0", [A]),
        (A, [A]),
        ("GPU-1a,GPU-2", [A, C]),
        ("GPU-2,GPU-1", [C]),  # the second names two
        (PART, [PART]),
        ("MIG-7d", [PART]),
    ],
)
def test_devices_are_named_as_cuda_reads_them(variable, expected):
    assert visible_devices(variable, [A, B, C], [PART]) == expected


@pytest.mark.parametrize("variable", ["3", "0,0", "GPU-9", "GPU-1", "MIG-9", "none", "a,0"])
def test_a_value_that_names_no_device_is_refused(variable):
    with pytest.raises(OptionError) as refusal:
        visible_devices(variable, [A, B, C], [PART])
    assert str(refusal.value).startswith(f"CUDA_VISIBLE_DEVICES={variable}: ")
    assert str(refusal.value).endswith("or set it to nothing to measure the CPU")


class NvmlError(Exception):
    """Of the library."""


def number_of_parts(handle):
    if handle == A:
        raise NvmlError
    return 7


def part(handle, number):
    if number != 2:
        raise NvmlError
    return PART


def nvml() -> SimpleNamespace:
    """The library on a machine with two GPUs, one of them with a part; handles are UUIDs."""
    return SimpleNamespace(
        NVMLError=NvmlError,
        nvmlDeviceGetCount=lambda: 2,
        nvmlDeviceGetHandleByIndex=lambda index: (A, B)[index],
        nvmlDeviceGetHandleByUUID=lambda uuid: uuid,
        nvmlDeviceGetUUID=lambda handle: handle,
        nvmlDeviceGetMaxMigDeviceCount=number_of_parts,
        nvmlDeviceGetMigDeviceHandleByIndex=part,
        nvmlDeviceGetName=lambda handle: f"name of {handle}".encode(),
        nvmlDeviceGetMemoryInfo=lambda handle: SimpleNamespace(total=2, free=1, used=1),
    )


def test_gpus_and_their_parts_are_found(monkeypatch):
    monkeypatch.setattr(machine, "_nvml", nvml)
    for variable, found in (("1,0", [B, A]), ("GPU-1a", [A]), ("MIG-7", [PART])):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", variable)
        gpus = this_machine().gpus
        assert [gpu.uuid for gpu in gpus] == found
        assert [gpu.name for gpu in gpus] == [f"name of {uuid}" for uuid in found]
