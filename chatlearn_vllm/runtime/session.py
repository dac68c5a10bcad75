"""Which job does this process run?"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from chatlearn_vllm.config import ConfigError, JobConfig, load_config
from chatlearn_vllm.observability.logging import configure_driver_logging, get_logger

logger = get_logger(__name__)

_current_job: JobConfig | None = None
"""Set by `init`, so that a script can say `VLLMPolicy("policy")`: names stand in the yaml."""


def init(config: str | None = None, overrides: Sequence[str] = ()) -> JobConfig:
    """Read and check the job; modules made afterwards belong to it. Starts no process.

    Args:
        config: path of the job's yaml; None reads `-c FILE [key=value ...]` from the command line,
            and ends the process with a message and exit code 2 if the job has errors.
        overrides: "runtime.num_episode=3" and the like; they win over the yaml.

    Raises:
        ConfigError: `config` was given and it, or an override, has errors.
    """
    configure_driver_logging()
    if config is None:
        job = _load_from_command_line()
    else:
        job = load_config(config, overrides, check_files=True)
    return use_job(job)


def use_job(job: JobConfig) -> JobConfig:
    """Make `job` the one that modules take by default, and log what was adapted in it."""
    global _current_job
    _current_job = job
    for notice in job.notices:
        logger.info(notice)
    return job


def current_job() -> JobConfig:
    """The job of the last `init`.

    Raises:
        ValueError: `init` was not called in this process.
    """
    if _current_job is None:
        raise ValueError("call chatlearn_vllm.init() before making modules, or give them job=...")
    return _current_job


def _load_from_command_line() -> JobConfig:
    parser = argparse.ArgumentParser()
    parser.add_argument("-c", "--config", required=True, metavar="JOB.yaml", help="the job")
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="as in runtime.num_episode=3"
    )
    # Overrides may stand on both sides of -c.
    arguments = parser.parse_intermixed_args()
    try:
        return load_config(arguments.config, arguments.overrides, check_files=True)
    except ConfigError as error:
        print(error, file=sys.stderr)
        raise SystemExit(2) from None
