"""The one layer behind all of `neuronjit.nn`: a model, its parameters, and the state it keeps."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_compiling
from torch.nn import Parameter

from ..errors import SpecError, expect_known, known
from ..models.block import RESETS
from ..models.model import NeuronModel
from ..models.surrogate import Surrogate
from ..neurons import as_model
from ..run.autograd import Output, carried, multistep
from ..run.checks import check_number
from ..settings import warn_once
from ..surrogates import ATan, Sigmoid, as_surrogate
from ..torch_private import capturing, current_backward

Number = float | Tensor
STEP_MODES = ("s", "m")  # one step a call, or a sequence
_MANY = 32  # calls that look like single steps, before a layer of sequences warns
# defaults are told from what a caller gives by identity, so these are objects of their own
SIGMOID, ATAN = Sigmoid(alpha=4.0), ATan(alpha=2.0)


class Neuron(torch.nn.Module):
    """A layer of `model` neurons, its state kept from call to call until `reset()`.

    Args:
        model: a `NeuronModel`, or the name of a built-in one.
        surrogate, surrogate_function: two names of one thing: ours, its name, or a SpikingJelly
            surrogate object; kept as `surrogate_function`.
        reset: "hard" or "soft". `v_reset=None` is soft too.
        detach_reset: cut the gradient through the spike in the reset.
        step_mode: "m": input and spikes are `[T, N, *]`; "s": one time step `[N, *]`.
        store_v_seq: keep v after every step as `v_seq`, `[T, N, *]`. Off: it is never allocated.
        learnable: names of parameters to learn, starting from their numbers.
        channels: C where parameters of shape `[C]` belong to the channels of `[T, N, C, *]`.
        backend: as for `neuronjit.multistep`.
        persistent_state: whether `state_dict` carries the state. SpikingJelly's never does.
        **params: the model's parameters.

    Raises:
        SpecError, InputTypeError: names, values or shapes that cannot be, here or when called.
    """

    step_mode: str
    surrogate_function: Surrogate
    backend: str | None = None  # old SpikingJelly's MemoryModule has a property of this name
    _derived: tuple[str, ...] = ()  # parameters of the model that a subclass computes
    _made_in = -1  # the backward in which the state was made, -1 outside of one
    _norm: Any = None  # the batch norm before it, which its kernels do: see batch_norm.py

    def __new__(cls, *args: Any, **options: Any) -> Any:
        """An instance that SpikingJelly, where it is imported, takes for a module of its own."""
        base = sys.modules.get("spikingjelly.activation_based.base")
        if base is None:
            return super().__new__(cls)
        from ..integrations.spikingjelly import adopted

        return super().__new__(adopted(cls, getattr(base, "MemoryModule", None)))

    def __init__(
        self,
        model: NeuronModel | str,
        *,
        surrogate: Any = None,
        surrogate_function: Any = ATAN,
        reset: str = "hard",
        detach_reset: bool = False,
        step_mode: str = "m",
        store_v_seq: bool = False,
        learnable: Iterable[str] = (),
        channels: int | None = None,
        backend: str | None = None,
        persistent_state: bool = False,
        **params: Any,
    ) -> None:
        super().__init__()
        self.model = as_model(model)
        if surrogate is not None:
            if surrogate_function is not ATAN and surrogate_function is not SIGMOID:
                raise SpecError(
                    f"{type(self).__name__}: surrogate= and surrogate_function= are two names of"
                    " one thing; give one of them"
                )
            surrogate_function = surrogate
        self.surrogate_function = surrogate_function
        if channels is not None and (type(channels) is not int or channels < 1):
            raise SpecError(f"channels must be a positive int or None, got {ascii(channels)[:80]}")
        self.reset_mode = expect_known(reset, RESETS, "reset")
        self.detach_reset = detach_reset
        self.step_mode = step_mode
        self.store_v_seq = store_v_seq
        self.v_seq: Tensor | None = None
        self.channels = channels
        self.backend = backend
        self.persistent_state = persistent_state
        if unknown := params.keys() - self.model.params:
            names = known(self.model.params)
            raise SpecError(f"unknown parameter {sorted(unknown)} of {self._label()}. {names}")
        if reset == "soft":
            params.setdefault("v_reset", None)
        wanted = (learnable,) if isinstance(learnable, str) else tuple(learnable)
        own = [name for name in self.model.params if name not in self._derived]
        if wrong := set(wanted) - set(own):
            raise SpecError(f"{self._label()} cannot learn {sorted(wrong)}. {known(own)}")
        for name in own:
            self._set_param(name, params.get(name, self.model.params[name]), name in wanted)
        for name in self.model.state:
            self._check_free(name)
        self._assigned: set[str] = set()  # states set from outside: a wrong shape is the caller's
        self._memories: dict[str, Any] = dict.fromkeys(self.model.state)  # None: not yet run
        self._held: dict[str, Tensor] = {}  # the state where CUDA graphs read and write it
        self._reset_in_capture = False
        self._steps_alone = 0  # calls that looked like single steps: see _note_single_step

    # --- parameters ----------------------------------------------------------------------------

    def _set_param(self, name: str, value: Any, learn: bool = False) -> None:
        self._check_free(name)
        if isinstance(value, Tensor):
            if (
                self.channels is not None
                and value.dim() == 1
                and len(value) not in (1, self.channels)
            ):
                raise SpecError(f"{name} has {len(value)} values, but channels={self.channels}")
            if learn and not isinstance(value, Parameter):
                value = Parameter(value.detach().clone())
        elif value is None and name == "v_reset":
            if learn:
                raise SpecError("v_reset=None is soft reset: there is no v_reset to learn")
        else:
            check_number(self.model, name, value, torch.float64)
            if learn:
                size = () if self.channels is None else (self.channels,)
                value = Parameter(torch.full(size, float(value)))
        if isinstance(value, Tensor) and not isinstance(value, Parameter):
            self.register_buffer(name, value)
        else:
            setattr(self, name, value)

    def _check_free(self, name: str) -> None:
        if hasattr(self, name):
            raise SpecError(f"'{name}' of {self._label()} is taken: every layer has it; rename it")

    def _label(self) -> str:
        return f"model '{self.model.name}'"

    def _per_channel(self, value: Tensor, x_seq: Tensor) -> Tensor:
        """[C] as [C, 1, ...], which broadcasts to [N, C, *]; any other shape as it is."""
        if value.dim() != 1 or len(value) == 1:
            return value
        if x_seq.dim() < 3 or x_seq.shape[2] != self.channels:
            raise SpecError(
                f"channels={self.channels}, so x_seq must be [T, N, {self.channels}, *],"
                f" but it is {list(x_seq.shape)}"
            )
        return value.reshape(-1, *(1 for _ in x_seq.shape[3:]))

    # --- running -------------------------------------------------------------------------------

    def forward(self, x: Tensor, *inputs: Tensor) -> Tensor:
        """Spikes, in x's shape and dtype; goes on from the state of the last call.

        `inputs` are those of the model besides x, in its order; each broadcasts to x.
        """
        start = self._carried(x)
        if isinstance(x, Tensor) and x.is_cuda and not is_compiling() and capturing():
            start = self._hold(start)
        out = self._run(x, inputs, start, ("v",) if self.store_v_seq else ())
        self._memories.update(out.state)  # in place: attributes of modules are slow to set
        self._assigned.clear()
        if self._held:
            self._write_back()
        if self.step_mode == "m":
            if self.store_v_seq:
                self.v_seq = out.record["v"]
            return out.spikes
        if self.store_v_seq:
            v = out.record["v"]
            fits = self.v_seq is not None and self.v_seq.shape[1:] == v.shape[1:]
            self.v_seq = torch.cat((self.v_seq, v)) if fits and self.v_seq is not None else v
        return out.spikes[0]

    def functional_forward(
        self, x: Tensor, state: Mapping[str, Number] | None = None, *inputs: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """(spikes, last state) from the state given, else the initial one; keeps nothing."""
        out = self._run(x, inputs, state or {}, ())
        return (out.spikes if self.step_mode == "m" else out.spikes[0]), dict(out.state)

    def _run(
        self,
        x: Tensor,
        inputs: tuple[Tensor, ...],
        state: Mapping[str, Any],
        record: tuple[str, ...],
    ) -> Output:
        run: Callable[..., Output] = multistep
        names = self.model.inputs[1:]
        if self._norm is not None:
            names, run = (*names, *self._norm.inputs), self._norm.multistep
        if len(inputs) != len(names):
            raise SpecError(
                f"{self._label()} has the inputs {', '.join(('x', *names))}; got"
                f" {1 + len(inputs)} of them"
            )
        if self.step_mode == "s" and isinstance(x, Tensor):
            whole = (isinstance(i, Tensor) and i.dim() == x.dim() for i in inputs)
            inputs = tuple(i.unsqueeze(0) if w else i for i, w in zip(inputs, whole, strict=True))
            x = x.unsqueeze(0)
        params = {name: getattr(self, name) for name in dict(self.model.params)}
        if self.channels is not None and isinstance(x, Tensor):
            params = {
                name: self._per_channel(value, x) if isinstance(value, Tensor) else value
                for name, value in params.items()
            }
        start = dict(state)
        for name, value in self.initial_state().items():
            if start.get(name) is None:
                if isinstance(value, Tensor) and isinstance(x, Tensor):
                    value = self._per_channel(value, x) if self.channels is not None else value
                    value = value.expand(x.shape[1:])
                start[name] = value
        if inputs:
            params.update(zip(names, inputs, strict=True))
        return run(
            self.model, x, start, surrogate=self.surrogate_function, reset=self.reset_mode,
            detach_reset=self.detach_reset, record=record, backend=self._target(), **params,
        )  # fmt: skip

    def _target(self) -> str | None:
        """`backend` of multistep; not the attribute itself where SpikingJelly's is of that name."""
        return self.backend

    # --- state ---------------------------------------------------------------------------------

    def initial_state(self) -> dict[str, Number]:
        """What each state starts from: the model's own numbers."""
        return dict(self.model.state)

    def _carried(self, x: Any) -> dict[str, Any]:
        """The kept state where it fits x; what was left by a batch of another shape starts anew."""
        if not isinstance(x, Tensor):
            return dict(self._memories)
        sequence, shape, device = self.step_mode == "m" and x.dim() > 0, x.shape, x.device
        step = shape[1:] if sequence else shape
        kept: dict[str, Any] = {}
        goes_on = learning = False
        for name, value in self._memories.items():
            if isinstance(value, Tensor) and name not in self._assigned:
                if value.shape != step:
                    continue
                if value.device != device:
                    value = value.to(device)
                if value is self._held.get(name):
                    value = value.clone()  # autograd may save it, and its place is written again
                value = carried(value, type(self).__name__)
                goes_on, learning = True, learning or value.requires_grad
            kept[name] = value
        if is_compiling():
            return kept
        now = current_backward()
        if goes_on and now not in (-1, self._made_in):
            raise SpecError(
                f"torch.utils.checkpoint runs {type(self).__name__} again, which would go on from"
                " the state in which it ended, not from that in which the call began: call"
                " reset_net(net) inside the checkpointed function, or functional_forward, which"
                " is given its state"
            )
        self.__dict__["_made_in"] = now  # attributes of modules are slow to set
        if goes_on and sequence:
            if shape[0] == 1 or (learning and len(shape) in (2, 4)):
                self._note_single_step(x)
            elif self._steps_alone:
                self._steps_alone = 0
        return kept

    def _note_single_step(self, x: Tensor) -> None:
        """Warn where a layer of sequences seems to be called by a loop over time, time after time.

        Its sequences have one step; or gradients go through many calls of `[N, C]` or
        `[N, C, H, W]`, of which it takes the first dimension for time. Resets in between do not
        end the count, because loops may be short; a whole sequence that goes on from another does.
        """
        self.__dict__["_steps_alone"] += 1
        if self._steps_alone == _MANY:
            warn_once(
                "single steps",
                f"{type(self).__name__} has step_mode='m', so each call takes a sequence"
                f" [T, N, *]; {_MANY} calls, the last with {list(x.shape)}, went on from the state"
                " of the one before, as single steps do. Call it once with the whole sequence, or"
                " set step_mode='s' for single steps [N, *]",
                UserWarning,
            )

    def reset(self) -> None:
        """Forget the state and the stored sequence."""
        self._memories.update(dict.fromkeys(dict(self.model.state)))
        self._assigned.clear()
        if self.v_seq is not None:
            self.v_seq = None
        captured = not is_compiling() and capturing()
        if captured != self._reset_in_capture:
            self._reset_in_capture = captured
        if not captured and self._held:  # the next replay reads it there
            for name, value in self.initial_state().items():
                if isinstance(value, Tensor):
                    self._held[name].copy_(value.detach())
                else:
                    self._held[name].fill_(value)
            self._memories.update(self._held)

    def detach(self) -> None:
        """Keep the state, cut its gradient: truncated backpropagation through time."""
        for name, value in self._memories.items():
            if isinstance(value, Tensor) and value is not self._held.get(name):
                value = value.detach()
                if value.is_cuda and not is_compiling() and not capturing():
                    # a graph of "reduce-overhead" writes its outputs again in its next replay
                    value = value.clone()
                self._memories[name] = value
        self.v_seq = _detached(self.v_seq)

    # --- state in a captured CUDA graph ----------------------------------------------------------

    def _hold(self, start: dict[str, Any]) -> dict[str, Any]:
        """What a captured call starts from: a copy of the state, whose place it writes at its end.

        So each replay goes on from the last one, and not from the state at the capture. Raises
        SpecError where that cannot be told: each replay would start anew.
        """
        anew, self._reset_in_capture = self._reset_in_capture, False
        for name in self.model.state:
            value = start.get(name)
            if isinstance(value, Tensor):
                if not (value.requires_grad and torch.is_grad_enabled()):
                    self._held[name] = self._memories[name].detach()
                    start[name] = value.detach().clone()
                # else it is of an earlier call in the same capture, as single steps are
            elif not anew:
                raise SpecError(
                    f"{type(self).__name__} has no state yet: each replay of this CUDA graph would"
                    " start anew; call reset_net(net) inside the captured step if that is meant,"
                    " else run the step once before the capture"
                )
        return start

    def _hand_over(self, name: str, value: Any) -> None:
        """Have the next replay of a captured graph start from a state that is assigned."""
        place, tensor = self._held[name], isinstance(value, Tensor)
        if tensor and value.shape not in (place.shape, ()):
            return  # for a call of another batch size than the graph's
        start = self.initial_state()[name] if value is None else value
        place.copy_(torch.as_tensor(start).detach())
        if not (tensor and value.requires_grad):
            self._memories[name] = place
            self._assigned.discard(name)

    def _write_back(self) -> None:
        for name, place in self._held.items():
            state = self._memories[name]
            if state.shape == place.shape and state.device == place.device:
                place.copy_(state.detach())
                if not state.requires_grad:
                    self._memories[name] = place

    def __getattr__(self, name: str) -> Any:
        memories = self.__dict__.get("_memories", {})
        if name not in memories:
            return super().__getattr__(name)
        value = memories[name]
        return self.initial_state()[name] if value is None else value

    def __setattr__(self, name: str, value: Any) -> None:
        if name in self.__dict__.get("_memories", ()):
            if isinstance(value, Tensor) and value.is_cuda and not is_compiling() and capturing():
                raise SpecError(
                    f"'{name}' of {type(self).__name__} cannot be assigned while a CUDA graph is"
                    " captured: replays would start from what it is now. Assign it before, or"
                    " change it in place"
                )
            self._memories[name] = value
            self._assigned.add(name)
            if name in self._held:
                self._hand_over(name, value)
            return
        if name == "surrogate_function":  # here: torch would make a module of SpikingJelly's
            value = as_surrogate(value)
        elif name == "step_mode":
            expect_known(value, STEP_MODES, "step_mode")
        elif name == "store_v_seq":
            self.v_seq = None
        super().__setattr__(name, value)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        self._held = {}  # graphs that were captured read parameters where they no longer are
        for name, value in self._memories.items():
            if isinstance(value, Tensor):
                moved = fn(value)
                # .half() is for parameters and sequences: the state is float32 whatever they are
                self._memories[name] = moved if moved.itemsize >= 4 else value.to(moved.device)
        # not super(): SpikingJelly's, where it comes next, would move the states once more
        return torch.nn.Module._apply(self, fn, recurse)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.persistent_state:
            for name, value in self._memories.items():
                if isinstance(value, Tensor):
                    destination[prefix + name] = value if keep_vars else value.detach()

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        if self.persistent_state:
            self.reset()
            for name in self.model.state:
                value = state_dict.pop(prefix + name, None)
                self._memories[name] = None if value is None else value.detach().clone()
        super()._load_from_state_dict(state_dict, prefix, *args)

    def __getstate__(self) -> dict[str, Any]:
        """For pickle and deepcopy, which refuse tensors with a history."""
        memories = {name: _detached(value) for name, value in self._memories.items()}
        kept = {"_memories": memories, "v_seq": _detached(self.v_seq), "_held": {}}
        return {**self.__dict__, **kept}

    def _replicate_for_data_parallel(self) -> Any:
        # what __dict__ holds is shared by all replicas, which run at the same time
        replica = super()._replicate_for_data_parallel()  # type: ignore[no-untyped-call]
        replica._memories, replica._assigned = dict(self._memories), set(self._assigned)
        return replica

    def extra_repr(self) -> str:
        """As SpikingJelly's, then the other parameters, the surrogate, and what is not default."""
        first = ("v_threshold", "v_reset", "detach_reset", "step_mode")
        names = [*first, *(n for n in self.model.params if n not in first)]
        shown = {n: shorten(getattr(self, n)) for n in names if n not in self._derived}
        shown["surrogate_function"] = str(self.surrogate_function)
        extras = ("channels", "backend", "store_v_seq", "persistent_state")
        shown |= {n: str(getattr(self, n)) for n in extras if getattr(self, n) not in (None, False)}
        named = f"'{self.model.name}', " if type(self).__name__ == "Neuron" else ""
        return named + ", ".join(f"{name}={text}" for name, text in shown.items())


def _detached(value: Any) -> Any:
    return value.detach() if isinstance(value, Tensor) else value


def shorten(value: Any) -> str:
    """A parameter in a repr: its number, or its shape."""
    if not isinstance(value, Tensor):
        return str(value)
    learned = " (learnable)" if value.requires_grad else ""
    if value.numel() == 1 and not value.is_meta:
        return f"{value.item():g}{learned}"
    return f"{list(value.shape)}{learned}"
