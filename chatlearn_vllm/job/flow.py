"""What does a flow say: which model is called on whose results, and what is returned?

A flow is a plain function over modules. It is called once, on the driver, before anything starts,
with a `Handle` in place of data; a module that is called with a handle notes the call and returns
another handle. So nothing of the function's source is read, and what it decides by ordinary values
(a loop over rewards, an `if` on a setting) is decided then.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NoReturn, Protocol

FLOW_METHODS = ("forward_step", "eval_forward", "train_step")
"""Methods of a module that a flow may call."""

FlowFunction = Callable[[Any], Any]
"""What a user writes: takes the handle of the data, returns handles."""


class FlowError(ValueError):
    """A flow's function does what cannot be recorded, or not what its role asks for."""


class Callee(Protocol):
    """What a flow knows of a module."""

    name: str
    job: Any


class Handle:
    """Stands for a batch that is known only when the job runs.

    It can be passed to modules and to `apply`, and returned; nothing else.
    """

    __slots__ = ("call", "recording")

    def __init__(self, recording: Recording, call: Call | None) -> None:
        """Made while a flow is recorded.

        Args:
            recording: of the flow.
            call: gives the batch; None for the flow's argument.
        """
        self.recording, self.call = recording, call

    def __repr__(self) -> str:
        origin = "its argument" if self.call is None else f"the result of {self.call}"
        return f"<{self.recording.name}: {origin}>"

    def _refuse(self, use: str) -> NoReturn:
        raise FlowError(
            f"{self.recording.name}: {use} {self!r}, which is known only when the job runs; the "
            "function is called once before, to see which models it calls. Look at data in a "
            "module's method, or in a function given to chatlearn_vllm.apply"
        )

    def __getattr__(self, name: str) -> NoReturn:
        if name.startswith("__"):  # Python asks for these itself, to copy or to show an object
            raise AttributeError(name)
        self._refuse(f"reads .{name} of")

    def __setattr__(self, name: str, value: Any) -> None:
        if name not in Handle.__slots__:
            self._refuse(f"sets .{name} of")
        object.__setattr__(self, name, value)

    def __getitem__(self, key: Any) -> NoReturn:
        self._refuse(f"reads [{key!r}] of")

    def __setitem__(self, key: Any, value: Any) -> NoReturn:
        self._refuse(f"sets [{key!r}] of")


def _refusing(use: str) -> Callable[..., NoReturn]:
    def refuse(self: Handle, *_: Any) -> NoReturn:
        self._refuse(use)

    return refuse


for _use, _names in {
    "asks whether it is true:": ("bool",),
    "loops over": ("iter", "next", "reversed"),
    "asks for the length of": ("len",),
    "searches in": ("contains",),
    "takes as a number": ("int", "float", "complex", "index", "round", "array"),
    "compares": ("eq", "ne", "lt", "le", "gt", "ge"),
    "computes with": tuple(
        prefix + name
        for prefix in ("", "r", "i")
        for name in ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "matmul")
        + ("and", "or", "xor", "lshift", "rshift")
    )
    + ("neg", "pos", "abs", "invert"),
    "calls": ("call",),
}.items():
    for _name in _names:
        setattr(Handle, f"__{_name}__", _refusing(_use))
Handle.__hash__ = object.__hash__  # type: ignore[method-assign]


@dataclass(frozen=True, eq=False)
class Call:
    """One step of a flow."""

    module: Callee | None
    """Whose method is called; None for a plain function."""
    method: str
    """One of FLOW_METHODS, or the function's name."""
    inputs: tuple[Handle, ...]
    function: Callable[[Any], Any] | None = None
    """Called on the driver, where there is no module."""

    def __str__(self) -> str:
        return f"{self.module.name}.{self.method}" if self.module else self.method

    def depends_on(self, other: Call) -> bool:
        """Whether the result of `other` went into this call, directly or not."""
        earlier: set[Call] = set()
        waiting = [self]
        while waiting:
            inputs = {one.call for one in waiting.pop().inputs if one.call is not None}
            waiting += inputs - earlier
            earlier |= inputs
        return other in earlier


@dataclass
class Recording:
    """A flow that is being recorded."""

    name: str
    """Of the function."""
    calls: list[Call] = field(default_factory=list)
    is_open: bool = True
    """Whether the function still runs."""


@dataclass(frozen=True)
class Flow:
    """A recorded function."""

    name: str
    """Of the function."""
    calls: tuple[Call, ...]
    """In the order in which they were made, so the inputs of a call come before it."""
    returned: tuple[Handle, ...]

    @property
    def modules(self) -> tuple[Any, ...]:
        """The modules that it calls, each once, in order."""
        return tuple(dict.fromkeys(call.module for call in self.calls if call.module is not None))

    def takers(self) -> list[Call]:
        """The calls that get the flow's argument itself."""
        return [call for call in self.calls if any(one.call is None for one in call.inputs)]

    def require_methods(self, *methods: str) -> None:
        """Check that modules are called by these methods only.

        Raises:
            FlowError: another one is called.
        """
        for call in self.calls:
            if call.module is not None and call.method not in methods:
                raise FlowError(
                    f"{self.name} calls {call}; in this place a flow calls {' or '.join(methods)}"
                )

    def require_result(self) -> None:
        """Check that something is returned, and that all calls lead to it.

        Raises:
            FlowError: nothing is returned, or the result of a call is lost.
        """
        if not self.returned:
            raise FlowError(
                f"{self.name} returns nothing: return the handle, or the handles, that it ends with"
            )
        used = {one.call for one in self.returned}
        for call in reversed(self.calls):
            if call not in used:
                raise FlowError(
                    f"{self.name}: the result of {call} is not used; pass it to another call, "
                    "return it, or leave the call out"
                )
            used.update(one.call for one in call.inputs)


def record(function: FlowFunction) -> Flow:
    """Call a flow's function once and keep what it calls.

    Args:
        function: takes one argument, the handle of the data.

    Raises:
        FlowError: the function raised, used a handle for something else than a call, returned
            what is no handle, or calls modules that are not of one job.
    """
    name = getattr(function, "__name__", type(function).__name__)
    recording = Recording(name)
    argument = Handle(recording, None)
    try:
        inspect.signature(function).bind(argument)
    except TypeError as error:
        raise FlowError(f"{name} must take one argument, the handle of the data: {error}") from None
    try:
        returned = function(argument)
    except FlowError:
        raise
    except Exception as error:  # of the user's function: named here, with its traceback
        raise FlowError(
            f"{name} raised {type(error).__name__} when it was called to see which models it "
            f"calls: {error}. What works on data belongs into a module, or into a function given "
            "to chatlearn_vllm.apply"
        ) from error
    finally:
        recording.is_open = False
    flow = Flow(name, tuple(recording.calls), _handles(recording, returned))
    _check_modules(flow)
    return flow


def apply(function: Callable[[Any], Any], *handles: Handle) -> Handle:
    """In a flow: call a plain function on the driver.

    Args:
        function: gets one batch, with the columns of all handles (see data/batch.py), and returns a
            dict of columns that are added or replaced; or a pair of that dict and a dict of
            metrics. To choose rows it returns all columns with fewer rows, as
            `data.batch.select` does.
        handles: whose columns it gets.

    Returns:
        The handle of the batch with what was added.

    Raises:
        FlowError: called without handles, or outside of a flow.
    """
    name = getattr(function, "__name__", type(function).__name__)
    if not callable(function) or not handles or not isinstance(handles[0], Handle):
        raise FlowError(
            f"apply({name}, ...): takes a function and then the handles of a flow; call {name} "
            "itself where there is none"
        )
    return _note(Call(None, name, handles, function), handles)


def records_calls(cls: type) -> type:
    """Let a class's FLOW_METHODS note a call where they get a handle, and run everywhere else."""
    for name in FLOW_METHODS:
        method = getattr(cls, name)
        # An inherited one notes calls already, unless it comes from a class that is no module.
        if getattr(method, "noted_as", None) != name and inspect.isfunction(method):
            setattr(cls, name, _recordable(name, method))
    return cls


def _recordable(name: str, method: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(method)
    def run_or_note(self: Any, *args: Any, **kwargs: Any) -> Any:
        # On a rank this line is all that is done; a policy comes here in every scheduler step.
        if (args and isinstance(args[0], Handle)) or (kwargs and _has_handle(kwargs.values())):
            values = (*args, *kwargs.values())
            return _note(Call(self, name, values), values)
        return method(self, *args, **kwargs)

    run_or_note.noted_as = name  # type: ignore[attr-defined]
    return run_or_note


def _has_handle(values: Any) -> bool:
    return any(isinstance(value, Handle) for value in values)


def _note(call: Call, values: tuple[Any, ...]) -> Handle:
    """Append a call to the flow that its handles are of."""
    recording = next(value for value in values if isinstance(value, Handle)).recording
    for place, value in enumerate(values, start=1):
        if not isinstance(value, Handle):
            raise FlowError(
                f"{recording.name}: argument {place} of {call} is {value!r}; a flow passes handles "
                "only (the iteration is added when the job runs; settings belong into the yaml)"
            )
        if value.recording is not recording or not recording.is_open:
            raise FlowError(
                f"{recording.name}: argument {place} of {call} is {value!r}; a handle is of use "
                "only in the flow that it was made in, while that is recorded"
            )
    recording.calls.append(call)
    return Handle(recording, call)


def _handles(recording: Recording, returned: Any) -> tuple[Handle, ...]:
    """What a flow's function returned, as a tuple; empty for None."""
    if returned is None:
        return ()
    values = tuple(returned) if isinstance(returned, tuple | list) else (returned,)
    for value in values:
        if not isinstance(value, Handle) or value.recording is not recording:
            raise FlowError(
                f"{recording.name} returns {value!r}; a flow returns handles of its own calls"
            )
    return values


def _check_modules(flow: Flow) -> None:
    first = flow.modules[0] if flow.modules else None
    by_name: dict[str, Any] = {}
    for module in flow.modules:
        if module.job is not first.job:
            raise FlowError(
                f"{flow.name}: models.{module.name} is of the job {module.job.path}, "
                f"models.{first.name} of another one, {first.job.path}; make the modules of a flow "
                "after one chatlearn_vllm.init()"
            )
        if by_name.setdefault(module.name, module) is not module:
            raise FlowError(
                f"{flow.name} calls two modules that are models.{module.name} of the yaml; make "
                "one and call it twice"
            )
