"""What is `chatlearn-vllm sync-plan` asked to plan? Reads and checks its options; pure Python."""

import json
import math
from dataclasses import dataclass
from pathlib import Path

from chatlearn_vllm.layouts import (
    MegatronShards,
    ModelShape,
    RolloutParallel,
    TrainParallel,
    VLLMShards,
)

ELEMENT_BYTES = {"bfloat16": 2, "float16": 2, "float32": 4}
"""By dtype of the weights on the way."""
MAX_GPUS = 2**14
"""More are taken for a slip of the pen, which would fill the memory."""

_TRAIN_KEYS = ("tp", "pp", "vpp", "ep", "etp", "dp", "first", "last")
_ROLLOUT_KEYS = ("tp", "pp", "ep", "replicas")
_NO_LAYOUT = ("attention_bias", "mlp_bias")
"""Keys of config.json that add parameters which are in no layout, and no trainer here has."""


class OptionError(ValueError):
    """An option of the command cannot be used; the message names it, its value and the rule."""


@dataclass(frozen=True)
class SyncOptions:
    """What is to be planned."""

    model: ModelShape
    dtype: str
    """Of the weights on the way."""
    train: TrainParallel
    rollout: RolloutParallel
    num_gpus: int
    """That both sides share."""
    gpus_per_host: int
    network_bytes_per_s: float
    """From or to one GPU."""

    @classmethod
    def parse(
        cls,
        model_dir: str,
        train: str,
        rollout: str,
        *,
        num_gpus: int | None,
        gpus_per_host: int,
        network_bytes_per_s: float,
    ) -> "SyncOptions":
        """Read the options of the command.

        Args:
            model_dir: holds config.json.
            train: as in "tp=4,pp=2"; without dp the trainer fills `num_gpus`.
            rollout: as in "tp=8"; without replicas the engines fill the GPUs.
            num_gpus: None for as many as the sizes ask for.
            gpus_per_host: GPU i is on host i // gpus_per_host.
            network_bytes_per_s: from or to one GPU.

        Raises:
            OptionError: an option cannot be read, or the sizes do not fit the model or each other.
        """
        _check_positive("--gpus", 1 if num_gpus is None else num_gpus)
        _check_positive("--gpus-per-host", gpus_per_host)
        _check_positive("--network-gbs", network_bytes_per_s / 1e9)
        _check_num_gpus("--gpus", num_gpus or 1)
        model, dtype = _read_model(model_dir)
        train_parallel = _train_parallel(train, num_gpus, bool(model.num_experts))
        rollout_parallel, num_gpus = _rollout_parallel(rollout, num_gpus, train_parallel.world_size)
        for option, text, make in (
            ("--train", train, lambda: MegatronShards(model, train_parallel)),
            ("--rollout", rollout, lambda: VLLMShards(model, rollout_parallel)),
        ):
            try:
                make()
            except ValueError as error:
                raise OptionError(f"{option} {text}: {error}") from error
        return cls(
            model, dtype, train_parallel, rollout_parallel, num_gpus, gpus_per_host,
            network_bytes_per_s,
        )  # fmt: skip


def _read_model(model_dir: str) -> tuple[ModelShape, str]:
    """Sizes and dtype of the model."""
    at = f"--model {model_dir}"
    try:
        config = json.loads((Path(model_dir) / "config.json").read_text())
    except FileNotFoundError:
        raise OptionError(f"{at}: must hold a config.json") from None
    except OSError as error:
        raise OptionError(f"{at}: {error}") from error
    except ValueError as error:
        raise OptionError(f"{at}: config.json is not JSON: {error}") from error
    if not isinstance(config, dict):
        raise OptionError(f"{at}: config.json must hold an object, not {type(config).__name__}")
    try:
        model = ModelShape.from_hf_config(config)
    except ValueError as error:
        raise OptionError(f"{at}: {error}") from error
    for key in _NO_LAYOUT:
        if config.get(key):
            raise OptionError(f"{at}: config.json: {key}={config[key]!r} has no weight layout")
    dtype = config.get("dtype") or config.get("torch_dtype") or "bfloat16"
    if not isinstance(dtype, str) or dtype not in ELEMENT_BYTES:
        raise OptionError(
            f"{at}: config.json: dtype={dtype!r} must be one of " + ", ".join(ELEMENT_BYTES)
        )
    return model, dtype


def _train_parallel(text: str, num_gpus: int | None, has_experts: bool) -> TrainParallel:
    sizes = _parse_sizes("--train", text, _TRAIN_KEYS)
    if "etp" in sizes and not has_experts:
        raise OptionError(f"--train {text}: etp={sizes['etp']}: the model has no experts")
    tp, pp, ep = sizes.get("tp", 1), sizes.get("pp", 1), sizes.get("ep", 1)
    etp = sizes.get("etp", tp)
    if num_gpus is not None and "dp" not in sizes and num_gpus % (tp * pp):
        raise OptionError(
            f"--train {text}: {num_gpus} GPUs cannot be filled with copies of tp x pp = {tp * pp} "
            "ranks; give dp="
        )
    enough = math.lcm(tp, ep * etp) // tp  # copies that hold all experts
    dp = sizes.get("dp", enough if num_gpus is None else num_gpus // (tp * pp))
    world_size = tp * pp * dp
    _check_num_gpus(f"--train {text}: tp x pp x dp =", world_size)
    if num_gpus is not None and world_size > num_gpus:
        raise OptionError(
            f"--train {text}: tp x pp x dp = {world_size} ranks exceed --gpus {num_gpus}"
        )
    if dp % enough:
        raise OptionError(
            f"--train {text}: tp x pp x dp = {world_size} ranks must be a multiple of ep x etp x "
            f"pp = {ep * etp * pp}; give a dp that is a multiple of {enough}"
            + ("" if "etp" in sizes else f", or etp, which is tp = {tp} otherwise")
        )
    try:
        return TrainParallel(
            world_size, tensor=tp, pipeline=pp, virtual_pipeline=sizes.get("vpp", 1),
            expert=ep, expert_tensor=sizes.get("etp"),
            first_stage_layers=sizes.get("first"), last_stage_layers=sizes.get("last"),
        )  # fmt: skip
    except ValueError as error:
        raise OptionError(f"--train {text}: {error}") from error


def _rollout_parallel(
    text: str, num_gpus: int | None, training_ranks: int
) -> tuple[RolloutParallel, int]:
    """The rollout's sizes, and how many GPUs there are."""
    sizes = _parse_sizes("--rollout", text, _ROLLOUT_KEYS)
    tp, pp = sizes.get("tp", 1), sizes.get("pp", 1)
    if sizes.get("ep", 1) not in (1, tp):
        raise OptionError(
            f"--rollout {text}: ep must be true, or tp = {tp}: whole experts are spread over the "
            "tensor parallel ranks; leave it out otherwise"
        )
    if num_gpus is None:
        num_gpus = max(training_ranks, tp * pp * sizes.get("replicas", 1))
        _check_num_gpus(f"--rollout {text}: tp x pp x replicas =", num_gpus)
    if "replicas" not in sizes and num_gpus % (tp * pp):
        raise OptionError(
            f"--rollout {text}: {num_gpus} GPUs cannot be filled with replicas of tp x pp = "
            f"{tp * pp} ranks; give replicas="
        )
    replicas = sizes.get("replicas", num_gpus // (tp * pp))
    if replicas * tp * pp > num_gpus:
        raise OptionError(
            f"--rollout {text}: tp x pp x replicas = {replicas * tp * pp} ranks exceed "
            f"--gpus {num_gpus}"
        )
    return RolloutParallel(tp, pp, "ep" in sizes, replicas), num_gpus


def _parse_sizes(option: str, text: str, keys: tuple[str, ...]) -> dict[str, int]:
    sizes: dict[str, int] = {}
    for part in text.split(","):
        key, _, value = (word.strip() for word in part.partition("="))
        if key not in keys:
            raise OptionError(f"{option} {text}: {key!r} is not one of {', '.join(keys)}")
        if (option, key, value.lower()) == ("--rollout", "ep", "true"):
            value = "1"
        # Python refuses to read thousands of digits.
        if not value.isdecimal() or len(value) > 20 or int(value) < 1:
            raise OptionError(f"{option} {text}: {key}={value} must be a positive integer")
        if key in sizes:
            raise OptionError(f"{option} {text}: {key} is given twice")
        sizes[key] = int(value)
    return sizes


def _check_positive(option: str, value: float) -> None:
    if not value > 0:
        raise OptionError(f"{option} {value:g}: must be positive")


def _check_num_gpus(what: str, number: int) -> None:
    if number > MAX_GPUS:
        raise OptionError(f"{what} {number}: must be at most {MAX_GPUS} GPUs")
