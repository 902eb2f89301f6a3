"""What is asked for: one noun, normalised and checked once, from which all else is made.

A `Call` and the values of its states, inputs and parameters decide the key of a plan, the plan, the
eager path and the text that a graph holds. They have one order everywhere: the model's `arguments`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

from torch import Tensor

from .. import settings
from ..errors import InputTypeError, SpecError, expect_known
from ..kernels.targets import TARGETS
from ..models.model import NeuronModel
from ..models.surrogate import Surrogate
from ..neurons import as_model
from ..surrogates import as_surrogate
from . import checks

BACKENDS = ("auto", *TARGETS, "eager")
Values = dict[str, float | Tensor]  # of all of a model's `arguments`, in their order


class Call(NamedTuple):
    """All of a call of `multistep` but its sequences, states and parameters."""

    model: NeuronModel
    surrogate: Surrogate
    reset: str  # "hard", "soft", or "own" where the model assigns v itself
    detach_reset: bool
    record: tuple[str, ...]  # in the order of the model's `recordable`
    final_state: bool
    backend: str


class Output(NamedTuple):
    """What `multistep` returns."""

    spikes: Tensor  # [T, N, *], dtype of x_seq
    state: Mapping[str, Tensor]  # each [N, *], arithmetic dtype
    record: dict[str, Tensor]  # each [T, N, *], dtype of x_seq


class _NoState(Mapping[str, Tensor]):
    """The state of an output that has none: going on from it must not start anew silently."""

    def __getitem__(self, name: str) -> Tensor:
        raise SpecError(f"there is no state '{name}': the call was made with final_state=False")

    def __iter__(self) -> Iterator[str]:
        return iter(())

    def __len__(self) -> int:
        return 0

    def __repr__(self) -> str:
        return "NO_STATE"

    def __reduce__(self) -> str:
        return "NO_STATE"


NO_STATE = _NoState()


def settle(
    model: Any,
    x: Any,
    state: Any,
    surrogate: Any,
    reset: Any,
    detach_reset: Any,
    record: Any,
    final_state: Any,
    backend: Any,
    params: Mapping[str, Any],
) -> tuple[Call, Values]:
    """The call and its values, normalised and checked. Raises what `multistep` says it raises.

    v_reset=None is soft reset; with soft reset, v_reset is 0 unless it is given.
    """
    model, surrogate = as_model(model), as_surrogate(surrogate)
    checks.check_input(x)
    state = as_state(state)
    checks.check_names(model, reset, state, params)
    if params.get("v_reset", 0.0) is None:
        reset, params = "soft", {**params, "v_reset": 0.0}
    elif reset == "soft":
        params = {"v_reset": 0.0, **params}
    call = Call(
        model,
        surrogate,
        "own" if model.own_reset else reset,
        checks.as_flag("detach_reset", detach_reset),
        checks.check_record(model, as_names(record)),
        checks.as_flag("final_state", final_state),
        as_backend(backend),
    )
    given = {**dict(model.state), **state, **dict(model.params), **params}
    values = {name: checks.check_value(model, name, given[name], x) for name in model.arguments}
    checks.check_reset(call.reset, values)
    return call, values


def as_state(state: Any) -> dict[str, Any]:
    """The initial states that were given, by name."""
    if state is None:
        return {}
    if state is NO_STATE:
        raise SpecError(
            "the state comes from a call with final_state=False, which returned none; pass"
            " state=None to start anew, or make that call with final_state=True"
        )
    if not isinstance(state, Mapping):
        raise InputTypeError(
            f"state must be a mapping from names to tensors or numbers, got {type(state).__name__}"
        )
    return dict(state)


def as_backend(backend: Any) -> str:
    """The backend that was asked for, here or by NEURONJIT_BACKEND."""
    if backend is None:
        backend = settings.backend()
    return expect_known(backend, BACKENDS, "backend")


def as_names(given: Any, what: str = "record") -> tuple[Any, ...]:
    """The names that were given, as they are; an iterator is read here and never again."""
    if isinstance(given, str):
        return (given,)
    if not isinstance(given, Iterable):
        raise InputTypeError(f"{what} must be names, got {type(given).__name__}")
    return tuple(given)


def signature(tensor: Tensor) -> tuple[Any, ...]:
    """All of a tensor that a plan depends on."""
    return (
        type(tensor), tensor.shape, tensor.stride(), tensor.dtype, tensor.device, tensor.layout,
        tensor.is_neg(),
    )  # fmt: skip


def exact(number: float) -> float | str:
    """The number as part of a key, where 0.0 and -0.0 must differ although they are equal."""
    return number or str(number)


def key_of(call: Call, x: Tensor, values: Values) -> tuple[Any, ...]:
    """What a plan of this call is kept under."""
    said = [signature(v) if isinstance(v, Tensor) else exact(v) for v in values.values()]
    return (call, signature(x), *said)


def tensors_of(values: Values) -> list[Tensor]:
    """The tensors among the values, in the model's order."""
    return [v for v in values.values() if isinstance(v, Tensor)]


_ABSENT = object()


def glance(names: Iterable[str], given: dict[str, Any], tensors: list[Tensor]) -> tuple[Any, ...]:
    """What `given` says of each name, as part of a key, without any check; collects the tensors.

    Raises TypeError where the values are to be normalised first: a name that is not in `names`, or
    a value that is no plain number or tensor and so may be equal to another but mean something else
    (True is 1, an object may have another `__float__` by the next call).
    """
    if not given:
        return ()
    said: list[Any] = []
    left = len(given)
    for name in names:
        value = given.get(name, _ABSENT)
        if value is _ABSENT:
            said.append(value)
            continue
        kind = type(value)
        if kind is float or kind is int:
            said.append(value or str(value))  # `exact`, without a call
        elif value is None:
            said.append(None)
        elif isinstance(value, Tensor):
            tensors.append(value)
            said.append(signature(value))
        else:
            raise TypeError
        left -= 1
    if left:
        raise TypeError
    return tuple(said)
