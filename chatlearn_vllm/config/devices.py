"""Which devices does a `device_mapping` name, and which replica would lie on which of them?"""

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

MAX_DEVICES = 65536
"""More are taken for a mistake."""

_TOKEN = re.compile(r"\s*(list|range|[0-9]+|[-+(),\[\]])")
_FORM = "list(range(0,8)), list(range(0,4))+list(range(8,12)) or [0, 1, 2]"
_DEVICES_PER_LINE = 16


def parse_device_mapping(value: Any) -> tuple[int, ...]:
    """Read the devices of a model, as a list or in ROLL's notation for one.

    A text is a sum of lists, each `[0, 1]` or `list(range(start, stop, step))` as Python counts
    them. Nothing else is understood, and nothing is evaluated.

    Returns:
        The devices in the order given; repetitions are left in.

    Raises:
        ValueError: it is something else, or names more than MAX_DEVICES.
    """
    if isinstance(value, str):
        return _Parser(value).read()
    if isinstance(value, list | tuple) and all(type(device) is int for device in value):
        return tuple(value)
    raise ValueError(f"must be a list of devices, as in {_FORM}")


class _Parser:
    """Recursive descent over `list ('+' list)*`."""

    def __init__(self, text: str) -> None:
        if len(text) > MAX_DEVICES:
            raise ValueError(f"is {len(text)} characters long; write it as {_FORM}")
        self._tokens: list[str] = []
        position = 0
        text = text.rstrip()
        while position < len(text):
            match = _TOKEN.match(text, position)
            if match is None:
                raise self._error(text[position:].strip()[:20])
            self._tokens.append(match[1])
            position = match.end()
        self._tokens.reverse()  # the next one is the last

    def read(self) -> tuple[int, ...]:
        devices = [*self._list()]
        while self._tokens:
            self._expect("+")
            devices += self._list()
            if len(devices) > MAX_DEVICES:
                raise ValueError(f"names more than {MAX_DEVICES} devices")
        return tuple(devices)

    def _list(self) -> Sequence[int]:
        token = self._next()
        if token == "[":
            return self._integers("]")
        if token == "list":
            self._expect("(")
            token = self._next()
            devices = self._integers("]") if token == "[" else self._range(token)
            self._expect(")")
            return devices
        return self._range(token)

    def _range(self, token: str) -> range:
        if token != "range":
            raise self._error(token)
        self._expect("(")
        bounds = self._integers(")")
        if not 1 <= len(bounds) <= 3 or (len(bounds) == 3 and bounds[2] == 0):
            raise ValueError(
                f"range takes a stop, or start, stop and a step other than 0; here are {bounds}"
            )
        devices = range(*bounds)
        # Not len(): it fails where the length is more than a machine word.
        if abs(devices.stop - devices.start) // abs(devices.step) > MAX_DEVICES:
            raise ValueError(f"names more than {MAX_DEVICES} devices")
        return devices

    def _integers(self, closing: str) -> list[int]:
        integers: list[int] = []
        while True:
            token = self._next()
            if token == closing and not integers:
                return integers
            sign = 1
            if token == "-":
                sign, token = -1, self._next()
            if not token.isdigit() or len(token) > len(str(MAX_DEVICES)):
                raise self._error(token)
            integers.append(sign * int(token))
            token = self._next()
            if token == closing:
                return integers
            if token != ",":
                raise self._error(token)

    def _expect(self, wanted: str) -> None:
        token = self._next()
        if token != wanted:
            raise self._error(token)

    def _next(self) -> str:
        return self._tokens.pop() if self._tokens else ""

    @staticmethod
    def _error(token: str) -> ValueError:
        place = f"{token!r} is not understood" if token else "ends too early"
        return ValueError(f"{place}; write it as {_FORM}")


def uneven_replicas(devices: Sequence[int], sizes: Mapping[str, int]) -> str | None:
    """What is wrong with devices that make no whole replicas; None if they do.

    Args:
        devices: of a model.
        sizes: its tensor and pipeline parallel size, by the names that the user has for them.
    """
    ranks = math.prod(sizes.values())
    if len(devices) % ranks == 0:
        return None
    product = f"{' x '.join(sizes)} = {' x '.join(map(str, sizes.values()))}"
    drawing = draw_replicas(devices, ranks).replace("\n", "\n      ")
    return f"{len(devices)} devices are not a multiple of {product}:\n      {drawing}"


def draw_replicas(devices: Sequence[int], ranks_per_replica: int) -> str:
    """Lines that show which rank of which replica each device would hold, and which are left.

    Example:
        draw_replicas([0, 1, 4], 2)
        # device        0    1    4
        # replica.rank  0.0  0.1  left
    """
    num_used = len(devices) - len(devices) % ranks_per_replica
    ranks = [f"{i // ranks_per_replica}.{i % ranks_per_replica}" for i in range(num_used)]
    ranks += ["left"] * (len(devices) - num_used)
    cells = [(str(device), rank) for device, rank in zip(devices, ranks, strict=True)]
    lines = []
    for start in range(0, len(cells), _DEVICES_PER_LINE):
        columns = [("device", "replica.rank"), *cells[start : start + _DEVICES_PER_LINE]]
        widths = [max(map(len, column)) for column in columns]
        for row in zip(*columns, strict=True):
            pairs = zip(row, widths, strict=True)
            lines.append("  ".join(cell.ljust(width) for cell, width in pairs).rstrip())
    return "\n".join(lines)
