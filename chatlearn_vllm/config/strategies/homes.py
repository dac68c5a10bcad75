"""Where does a key belong that stands in another map of a strategy file, or under another name?"""

from collections.abc import Collection

from chatlearn_vllm.config.problems import Key, dotted_key
from chatlearn_vllm.config.strategies import keys, strategy_keys
from chatlearn_vllm.config.strategies.fields import megatron_fields, sampling_fields, vllm_fields
from chatlearn_vllm.config.upstream_fields import dropped_by_vllm

_GENERATES, _TRAINS = ("actor_infer", "rewards", "reward_model"), ("actor_train", "critic")
_ROLES = (*_GENERATES, *_TRAINS, "reference")
_SAYS_THE_ENGINE = "strategy_args.strategy_name says which engine a role has: vllm or hf_infer"
_OTHER_WORDS = {
    "num_generations": "num_return_sequences_in_group, at the top, says it",
    "max_completion_length": "response_length, at the top, says it",
    "num_gpu": "device_mapping of the role says it",
    "inference_engine": _SAYS_THE_ENGINE,
    "use_vllm": _SAYS_THE_ENGINE,
}
"""Keys of our own dialect, and of other frameworks, that no table has under our name."""
_SERVER = (
    "a file that describes roles has no server mode, its engines run in the job; leave it out, or "
    "describe models (docs/server.md)"
)

_MAPS: tuple[tuple[tuple[str, ...], keys.Keys, tuple[str, ...]], ...] = (
    # the map, its table, and the roles that it means something in, the usual one first
    ((), keys.ROLE, _ROLES),
    (("strategy_args",), strategy_keys.STRATEGY, _ROLES),
    (("model_args",), keys.MODEL_ARGS, _ROLES),
    (("training_args",), keys.TRAINING_ARGS, _TRAINS),
    (("generating_args",), keys.GENERATING_ARGS, (*_GENERATES, "validation")),
    (("data_args",), keys.DATA_ARGS, ("actor_train", "validation")),
    (("strategy_args", "strategy_config"), strategy_keys.VLLM, _GENERATES),
    (("strategy_args", "strategy_config"), strategy_keys.MEGATRON, (*_TRAINS, "reference")),
    (("sequence_packing_args",), keys.PACKING, (*_TRAINS, "reference")),
)


def home_of(path: Key, name: str, table: keys.Keys, further: Collection[str] = ()) -> str | None:
    """What is to be said of a key that its map does not know.

    Args:
        path: of the map that it stands in.
        name: of the key.
        table: of the map.
        further: names that the map knows besides.

    Returns:
        The rule that names its place, None where there is none.
    """
    if name.startswith("vllm_server"):
        return f"unknown key: {_SERVER}"
    if other := _OTHER_WORDS.get(name) or dropped_by_vllm(name):
        return f"unknown key: {other}"
    if same := _same_here(name, table, further):
        return f"unknown key; it is called {same} here"
    if path and isinstance(keys.TOP.get(name), keys.Becomes):
        return "unknown key here; it belongs at the top of the file"
    for inner, other, roles in _MAPS:
        if isinstance(other.get(name), keys.Becomes):
            return _belongs(path, inner, roles)
    for inner, names, roles in (
        (("generating_args",), sampling_fields(), (*_GENERATES, "validation")),
        (("strategy_args", "strategy_config"), vllm_fields(), _GENERATES),
        (("strategy_args", "strategy_config"), megatron_fields(), (*_TRAINS, "reference")),
    ):
        if name in names:
            return _belongs(path, inner, roles)
    if same := _same_here(name, keys.TOP, ()):
        return f"unknown key; it is called {same} here, at the top of the file"
    for inner, other, roles in _MAPS:
        if same := _same_here(name, other, ()):
            place = dotted_key(_place(path, inner, roles))
            return f"unknown key; it is called {same} here, in {place}"
    return None


def _same_here(name: str, table: keys.Keys, further: Collection[str]) -> str | None:
    """What a map calls that which is written under our name, or under that of another map."""
    for theirs, entry in table.items():
        if name in _ours(entry):
            return theirs
    for _, other, _ in _MAPS:
        for ours in _ours(other[name]) if name in other else ():
            if ours in further:
                return ours
    return None


def _belongs(path: Key, inner: Key, roles: Collection[str]) -> str | None:
    place = _place(path, inner, roles)
    if place == path:
        return None
    is_one_of_many = roles == _ROLES and (not path or path[0] not in roles)
    example = "a role, such as " if is_one_of_many else ""
    return f"unknown key here; it belongs in {example}{dotted_key(place)}"


def _place(path: Key, inner: Key, roles: Collection[str]) -> Key:
    """The map of the role that the key stands in, if it can be there, else of the usual role."""
    if path and path[0] in roles:
        return (*path[: 2 if path[0] == "rewards" else 1], *inner)
    return (next(iter(roles)), *inner)


def _ours(entry: keys.Becomes | keys.NoEffect) -> set[str]:
    """Our names for what a key sets."""
    ours = entry.ours if isinstance(entry, keys.Becomes) else ""
    return {part.split()[0].rpartition(".")[2] for part in ours.split(",") if part.strip()}
