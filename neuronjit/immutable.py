"""Values that never change: plans, kernels and hashes are made from them once."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NoReturn

from .errors import InputTypeError


class Immutable:
    """An object whose attributes are set once, through its `__dict__`, while it is made.

    `_advice` is the start of every refusal; it says how to get another object.
    """

    _advice: str

    def __setattr__(self, name: str, value: object) -> NoReturn:
        raise InputTypeError(f"cannot set '{name:.40}': {self._advice}")

    def __delattr__(self, name: str) -> NoReturn:
        raise InputTypeError(f"cannot delete '{name:.40}': {self._advice}")


class ReadOnly(dict[str, float]):
    """Names and numbers that can be read only; a dict, so that JSON and `**` take it as one.

    `advice` is the end of every refusal; "{change}" in it stands for what was tried: tau=4.0.
    Code that torch.compile traces reads it through `dict(...)`: Dynamo of torch 2.6 follows `in`
    and that, but no loop over it.
    """

    def __init__(self, values: Mapping[str, float], advice: str) -> None:
        super().__init__(values)
        self._advice = advice

    def _refuse(self, *arguments: Any, **named: Any) -> NoReturn:
        raise InputTypeError(self._advice.replace("{change}", "name=number"))

    def __setitem__(self, name: str, value: Any) -> NoReturn:
        change = f"{name!s:.40}={value!r:.40}"
        raise InputTypeError(self._advice.replace("{change}", change))

    __delitem__ = clear = pop = popitem = setdefault = update = _refuse
    __ior__ = _refuse

    def __reduce__(self) -> tuple[Any, ...]:
        """Copied and pickled whole: by default, items are set one by one."""
        return ReadOnly, (dict(self), self._advice)
