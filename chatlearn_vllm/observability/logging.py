"""How does a log line say which rank wrote it, and which upstream lines are left out?"""

from __future__ import annotations

import logging
import sys
import warnings

NOISY_LOGGERS = {
    "vllm": logging.ERROR,  # its warnings restate settings that were chosen here
    "megatron": logging.ERROR,  # missing Transformer Engine and apex are fine here
    "transformers": logging.ERROR,
    "ray": logging.WARNING,
    "filelock": logging.WARNING,
    "urllib3": logging.WARNING,
}
"""Lowest level that is shown of each upstream package."""

UPSTREAM_ENV = {
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_CONFIGURE_LOGGING": "1",
    "TRANSFORMERS_VERBOSITY": "error",
    "TOKENIZERS_PARALLELISM": "false",
}
"""Levels that upstream reads from the environment, once, while it is imported."""


def get_logger(name: str) -> logging.Logger:
    """The logger of a module; pass `__name__`."""
    return logging.getLogger(name)


def configure_driver_logging(level: int = logging.INFO) -> None:
    """Show this package's log lines on stderr, unless the user's script has set up logging."""
    package_logger = logging.getLogger("chatlearn_vllm")
    package_logger.setLevel(level)
    if not logging.getLogger().handlers and not package_logger.handlers:
        package_logger.addHandler(_handler("[chatlearn_vllm]"))
    quiet_upstream()


def configure_rank_logging(module: str, replica: int, rank: int) -> None:
    """Prefix every log line of this process with `[module replica rank]`.

    Rank 0 of a replica shows this package's INFO lines; the others do the same work and show only
    warnings. The process belongs to the framework, so the root logger is ours to set.
    """
    root = logging.getLogger()
    root.handlers[:] = [_handler(f"[{module} {replica} {rank}]")]
    root.setLevel(logging.WARNING)
    logging.getLogger("chatlearn_vllm").setLevel(logging.INFO if rank == 0 else logging.WARNING)
    quiet_upstream()


def quiet_upstream() -> None:
    """Raise the level of upstream loggers and drop the warnings that no user of ours can act on."""
    for name, level in NOISY_LOGGERS.items():
        logging.getLogger(name).setLevel(level)
    warnings.filterwarnings("ignore", module=r"megatron\..*")
    warnings.filterwarnings("ignore", message=r".*[Tt]ransformer ?[Ee]ngine.*")
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"(torch|vllm)\..*")
    # megatron-core asks views of its gradient buffers for a gradient of their own.
    warnings.filterwarnings("ignore", message=r"The \.grad attribute of a Tensor that is not a l.*")
    warnings.filterwarnings("ignore", message=r".*[Aa]pex.*")


def _handler(prefix: str) -> logging.Handler:
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter(f"{prefix} %(levelname)s %(message)s"))
    return handler
