"""Drawing a surrogate gradient, and a neuron's answer to a current, with matplotlib."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .errors import BackendError, InputTypeError, SpecError
from .models.model import NeuronModel
from .models.surrogate import Surrogate
from .neurons import as_model
from .run.autograd import multistep
from .run.reference import evaluate
from .surrogates import as_surrogate

POINTS = 1001  # of a curve of u


def plot(
    what: Any,
    current: Any = None,
    *,
    ax: Any = None,
    u: tuple[float, float] = (-2.0, 2.0),
    **options: Any,
) -> Any:
    """Draw a surrogate over u, or what a neuron does with a current over time steps.

    Args:
        what: a `Surrogate` or its name, whose derivative and primitive (where it has one) are
            drawn; or, with `current`, a `NeuronModel` or its name, whose v, h, threshold and
            spikes are drawn.
        current: the input of one neuron at each time step, `[T]`: a tensor, an array or numbers.
        ax: the matplotlib Axes to draw in; a new figure's by default.
        u: of a surrogate, the first and the last h - theta.
        **options: of a neuron, as for `neuronjit.multistep`: reset, state, parameters, ... It is
            run in eager PyTorch unless `backend` says otherwise.

    Returns:
        The Axes; `.figure` is its Figure.

    Raises:
        BackendError: there is no matplotlib.
        SpecError, InputTypeError: as `multistep`; or `what` and `current` do not fit.
    """
    if current is None and isinstance(what, NeuronModel):
        raise SpecError("a neuron needs an input to answer: plot(model, current=[...])")
    if current is None and options:
        raise SpecError(f"{sorted(options)} are of neurons, and without a current there is none")
    if current is not None and isinstance(what, Surrogate):
        raise SpecError("a surrogate has no current; plot(surrogate) draws it over u")
    drawn = as_surrogate(what) if current is None else as_model(what)
    if ax is None:
        ax = _pyplot().subplots(layout="constrained")[1]
    if isinstance(drawn, Surrogate):
        return _of_surrogate(drawn, ax, u)
    return _of_neuron(drawn, _as_current(current), ax, options)


def _pyplot() -> Any:
    try:
        from matplotlib import pyplot
    except ImportError as error:
        raise BackendError(
            f"plot needs matplotlib ({error}). Install it with pip install 'neuronjit[plot]'"
        ) from None
    return pyplot


def _of_surrogate(surrogate: Surrogate, ax: Any, ends: tuple[float, float]) -> Any:
    u = torch.linspace(*ends, POINTS, dtype=torch.float64)
    values = {name: u.new_tensor(value) for name, value in surrogate.params.items()}
    for label, tree in (
        ("derivative", surrogate.derivative_tree),
        ("primitive", surrogate.primitive_tree),
    ):
        if tree is not None:
            y = evaluate(tree, {"u": u, **values}, u.new_tensor)
            ax.plot(u, y.expand(POINTS), label=label)
    ax.set(xlabel="u = h - theta", title=str(surrogate))
    ax.legend()
    return ax


def _as_current(given: Any) -> Tensor:
    try:
        current = torch.as_tensor(given)
    except (TypeError, ValueError, RuntimeError) as error:
        raise InputTypeError(f"current must be numbers, one a time step ({error})") from None
    if current.dim() != 1:
        shape = list(current.shape)
        raise SpecError(f"current must be [T], the input of one neuron, got shape {shape}")
    current = current.detach()
    return current if current.is_floating_point() else current.float()


def _of_neuron(model: NeuronModel, current: Tensor, ax: Any, options: dict[str, Any]) -> Any:
    record = tuple(n for n in ("v", "h", "theta") if n in model.recordable)
    options = {"backend": "eager", **options}
    with torch.no_grad():
        out = multistep(model, current.unsqueeze(1), record=record, **options)
    seen = {name: sequence[:, 0].float().cpu() for name, sequence in out.record.items()}
    if "theta" not in seen:
        threshold = options.get("v_threshold", model.params["v_threshold"])
        seen["theta"] = torch.as_tensor(threshold).detach().float().cpu().expand(len(current))
    spikes = out.spikes[:, 0].float().cpu()
    t = torch.arange(len(current))
    ax.plot(t, seen["v"], label="v")
    ax.plot(t, seen["h"], ".", markersize=3, label="h, before the reset")
    ax.plot(t, seen["theta"], "--", label="threshold")
    if bool(((spikes == 0) | (spikes == 1)).all()):  # ticks at the top, as in a raster
        at = t[spikes == 1]
        top = ax.get_xaxis_transform()
        ax.vlines(at, 0.94, 1.0, transform=top, color="black", label="spikes")
    else:  # ternary, integer, graded
        ax.step(t, spikes, where="mid", color="black", label="out.spikes")
    ax.set(xlabel="time step", title=model.name)
    ax.legend()
    return ax
