"""Are the tensors that come those of a whole checkpoint, each once and of its shape?"""

from collections.abc import Iterable, Iterator

import torch

from chatlearn_vllm.layouts import ModelShape


def checked_tensors(
    tensors: Iterable[tuple[str, torch.Tensor]], shape: ModelShape
) -> Iterator[tuple[str, torch.Tensor]]:
    """Pass the tensors of a checkpoint on.

    Args:
        tensors: by their Hugging Face names.
        shape: sizes of the model.

    Raises:
        ValueError: a tensor is unknown, came twice, has another shape, or did not come.
    """
    missing = set(shape.tensor_names())
    for name, tensor in tensors:
        if name not in missing:
            raise ValueError(f"load_weights(): tensor {name!r} is unknown, or came twice")
        if tuple(tensor.shape) != shape.tensor_shape(name):
            raise ValueError(
                f"load_weights(): tensor {name!r} is {tuple(tensor.shape)}, the model's is "
                f"{shape.tensor_shape(name)}"
            )
        missing.remove(name)
        yield name, tensor
    if missing:
        raise ValueError(f"load_weights(): {len(missing)} tensors did not come: {_some(missing)}")


def _some(names: set[str], limit: int = 5) -> str:
    shown = sorted(names)[:limit]
    return ", ".join(shown) + (", ..." if len(names) > limit else "")
