"""A fault inside a weight copy, where a sync is half done."""

import os

from torch.utils._python_dispatch import TorchDispatchMode

COPIES_BEFORE_THE_FAULT = 5


class FaultInCopy(TorchDispatchMode):
    """Lets some copies into tensors happen, then raises or ends the process instead of the next."""

    def __init__(self, fault):
        super().__init__()
        self.fault, self.left = fault, COPIES_BEFORE_THE_FAULT

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        if "copy_" in operator.name():
            if self.left == 0 and self.fault == "exit":
                os._exit(1)
            if self.left == 0:
                raise RuntimeError("a copy failed")
            self.left -= 1
        return operator(*args, **(kwargs or {}))
