"""Surrogates: values and slopes of the smooth spike, numbers, and that nothing of them changes."""

import copy
import io
import json
import math
import multiprocessing
import pickle
from collections.abc import Callable, Mapping, MutableMapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from support import each_device

import neuronjit as nj
from neuronjit.language.calculus import derivative
from neuronjit.run.reference import evaluate

# --- the smooth spike -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Exact:
    """A primitive in Python's floats, by formulas that keep their digits everywhere.

    `value` and `slope` are functions of u; `kinks` are where the slope jumps. A value is right to
    its last digits where u is below `tail`, and within a rounding of 1 elsewhere; so is a slope
    where `absolute` holds, because the formula itself (1 - sigmoid, 1 - tanh**2) loses it there.
    """

    value: Callable[[float], float]
    slope: Callable[[float], float]
    kinks: tuple[float, ...] = ()
    tail: float = -math.inf
    absolute: Callable[[float], bool] = lambda u: False
    largest: float = math.inf  # beyond it, u is rounded more coarsely than a period


def _tail(f: Callable[[float], float]) -> Callable[[float], float]:
    """The distribution function with this lower tail, as a function of the distance."""
    return lambda u: f(-u) if u < 0 else 1 - f(u)


def _exp(x: float) -> float:
    return math.exp(x) if x > -745 else 0.0


def _sigmoid(x: float) -> float:
    return 1 / (1 + _exp(-x)) if x > 0 else _exp(x) / (1 + _exp(x))


def _sigmoid_slope(x: float) -> float:
    return _exp(-abs(x)) / (1 + _exp(-abs(x))) ** 2


def _log_abs(u: float) -> float:
    return math.copysign(math.log1p(abs(u)), u)


def _bell(x: float) -> float:
    return _exp(-min(x * x, 1e4))


# with the default numbers of each: alpha 4 or 2 or 1, and so on
EXACT = {
    "Sigmoid": Exact(
        lambda u: _sigmoid(4 * u),
        lambda u: 4 * _sigmoid_slope(4 * u),
        tail=math.inf,
        absolute=lambda u: u > 0,
    ),
    "ATan": Exact(
        lambda u: math.atan(math.pi * u) / math.pi + 0.5, lambda u: 1 / (1 + (math.pi * u) ** 2)
    ),
    "PiecewiseLeakyReLU": Exact(
        lambda u: u / 2 + 0.5 if abs(u) < 1 else 0.01 * (u - math.copysign(1, u)) + (u > 0),
        lambda u: 0.5 if abs(u) < 1 else 0.01,
        kinks=(1.0,),
    ),
    "S2NN": Exact(
        lambda u: _sigmoid(4 * u) if u < 0 else math.log(u + 1 + 1e-5) + 0.5,
        lambda u: 4 * _sigmoid_slope(4 * u) if u < 0 else 1 / (u + 1 + 1e-5),
        tail=0.0,
    ),
    "QPseudoSpike": Exact(
        _tail(lambda d: 0.5 / (1 + 2 * d)), lambda u: 1 / (1 + 2 * abs(u)) ** 2, tail=0.0
    ),
    "LeakyKReLU": Exact(lambda u: max(u, 0.0), lambda u: float(u >= 0)),
    "LogTailedReLU": Exact(
        lambda u: 0.0 if u <= 0 else u if u <= 1 else math.log(u) + 1,
        lambda u: 0.0 if u <= 0 else 1.0 if u <= 1 else 1 / u,
        kinks=(1.0,),
    ),
    "PiecewiseQuadratic": Exact(
        _tail(lambda d: 0.5 * max(0.0, 1 - d) ** 2),
        lambda u: max(0.0, 1 - abs(u)),
        kinks=(1.0,),
        tail=0.0,
    ),
    "PiecewiseExp": Exact(_tail(lambda d: 0.5 * _exp(-d)), lambda u: 0.5 * _exp(-abs(u)), tail=0.0),
    "SoftSign": Exact(
        _tail(lambda d: 0.5 / (1 + 2 * d)), lambda u: 1 / (1 + 2 * abs(u)) ** 2, tail=0.0
    ),
    "FastSigmoid": Exact(
        lambda u: u / (1 + 25 * abs(u)) + 0.5,
        lambda u: 1 / (1 + 25 * abs(u)) ** 2,
        kinks=(0.04,),
    ),
    "Erf": Exact(
        lambda u: 0.5 * math.erfc(-2 * u),
        lambda u: 2 / math.sqrt(math.pi) * _bell(2 * u),
        tail=math.inf,
    ),
    "NonzeroSignLogAbs": Exact(_log_abs, lambda u: 1 / (1 + abs(u))),
    "Rect": Exact(
        lambda u: min(max(u + 0.5, 0.0), 1.0), lambda u: float(abs(u) < 0.5), kinks=(0.5,)
    ),
    "StraightThrough": Exact(lambda u: u, lambda u: 1.0),
    "SquarewaveFourierSeries": Exact(
        lambda u: 0.5 + 2 / math.pi * math.sin(2 * math.pi * u / 8),
        lambda u: 0.5 * math.cos(2 * math.pi * u / 8),
        absolute=lambda u: True,
        largest=1.0,
    ),
    "Gaussian": Exact(
        lambda u: 0.5 * math.erfc(-u / math.sqrt(2)),
        lambda u: _bell(u / math.sqrt(2)) / math.sqrt(2 * math.pi),
        tail=math.inf,
    ),
    "Tanh": Exact(
        lambda u: math.tanh(u) + 0.5,
        lambda u: 4 * _sigmoid_slope(2 * u),
        absolute=lambda u: True,
    ),
}


def surrogate_of(name: str, **options: Any) -> nj.Surrogate:
    return getattr(nj.surrogates, name)(**options)


def points(exact: Exact, dtype: torch.dtype) -> torch.Tensor:
    """0, beside it, in the middle, far out, where exp overflows; the kinks and beside them."""
    info = torch.finfo(dtype)
    sizes = [
        info.tiny,
        1e-30,
        info.eps,
        1e-3,
        0.1,
        0.7,
        1.5,
        3.0,
        5.0,
        10.0,
        100.0,
        1e4,
        1e15,
        1e30,
    ]
    sizes = [size for size in sizes if size <= exact.largest] + list(exact.kinks)
    u = torch.tensor([0.0, *sizes, *(-s for s in sizes)], dtype=dtype)
    near = torch.tensor([k for kink in exact.kinks for k in (kink, -kink)], dtype=dtype)
    beside = [near.nextafter(torch.full_like(near, to)) for to in (-math.inf, math.inf)]
    return torch.cat([u, *beside])


def by_kernel(surrogate: nj.Surrogate, u: torch.Tensor, backend: Any, device: str) -> Any:
    """One step of IF with threshold 0: u is x, whatever its size."""
    x = u.to(device)[None].requires_grad_()
    out = nj.multistep(
        nj.neurons.IF, x, surrogate=surrogate, reset="soft", backend=backend, v_threshold=0.0
    )
    (slope,) = torch.autograd.grad(out.spikes.sum(), x)
    return out.spikes[0].detach().cpu(), slope[0].cpu()


def by_trees(surrogate: nj.Surrogate, u: torch.Tensor) -> Any:
    values = {"u": u, **{name: u.new_tensor(n) for name, n in surrogate.params.items()}}
    trees = surrogate.primitive_tree, derivative(surrogate.primitive_tree, "u")
    return [evaluate(tree, values, u.new_tensor).expand(u.shape) for tree in trees]


def assert_exact(
    actual: torch.Tensor, u: torch.Tensor, exact: Callable[[float], float],
    absolute: Callable[[float], bool], slack: float = 0.0,
) -> None:  # fmt: skip
    """Within some roundings: of the number itself, or of 1 where `absolute` says so.

    A number that is exp of something has the rounding of that something, as often as it is large.
    """
    info = torch.finfo(u.dtype)
    for got, at in zip(actual.tolist(), u.tolist(), strict=True):
        want = exact(at)
        steps = 16 + 4 * abs(math.log(abs(want))) if want else 16
        size = max(1.0, abs(want)) if absolute(at) else abs(want)
        allowed = (steps * info.eps + slack) * size + 2 * info.tiny
        assert abs(got - want) <= allowed, f"at u = {at!r}: {got!r}, expected {want!r}"


each_exact = pytest.mark.parametrize("name", EXACT)
each_real = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["f32", "f64"])


def test_every_primitive_is_tested() -> None:
    smooth = {s.name for s in vars(nj.surrogates).values() if isinstance(s, nj.Surrogate)}
    smooth = {name for name in smooth if surrogate_of(name).primitive is not None}
    assert smooth == EXACT.keys() - {"SquarewaveFourierSeries"}


@each_exact
@each_real
@pytest.mark.parametrize("how", ["kernel", "eager", "trees"])
def test_smooth_spikes_and_their_slopes_are_exact_everywhere(
    how: str, dtype: torch.dtype, name: str
) -> None:
    exact, surrogate = EXACT[name], surrogate_of(name, spiking=False)
    u = points(exact, dtype)
    if how == "trees":
        value, slope = by_trees(surrogate, u)
    else:
        value, slope = by_kernel(surrogate, u, None if how == "kernel" else how, "cpu")
    assert_exact(value, u, exact.value, lambda u: u >= exact.tail)
    assert_exact(slope, u, exact.slope, exact.absolute)


@pytest.mark.cuda
@each_exact
@each_real
def test_smooth_spikes_and_their_slopes_on_the_gpu(dtype: torch.dtype, name: str) -> None:
    exact, surrogate = EXACT[name], surrogate_of(name, spiking=False)
    u = points(exact, dtype)
    value, slope = by_kernel(surrogate, u, None, "cuda")
    assert_exact(value, u, exact.value, lambda u: u >= exact.tail)
    assert_exact(slope, u, exact.slope, exact.absolute)


@each_exact
@each_real
@each_device
def test_the_derivative_is_that_of_the_primitive(
    device: str, dtype: torch.dtype, name: str
) -> None:
    """What backward uses for spikes, at the kinks too."""
    exact = EXACT[name]
    u = points(exact, dtype)
    _, slope = by_kernel(surrogate_of(name), u, None, device)
    slack = 2e-5 if name == "S2NN" else 0.0  # its primitive has 1e-5 in a logarithm
    assert_exact(slope, u, exact.slope, exact.absolute, slack)


@pytest.mark.parametrize("k", [0.0, 1e-3, 1.0, 1e3])
@each_real
def test_a_fast_sigmoid_of_any_steepness(dtype: torch.dtype, k: float) -> None:
    surrogate = nj.surrogates.FastSigmoid(k=k, spiking=False)
    u = torch.tensor(
        [0.0, 1e-6, 0.3, 1.0, 7.0, 100.0, -1e-6, -0.3, -1.0, -7.0, -100.0], dtype=dtype
    )
    k = torch.tensor(k, dtype=dtype).item()
    for backend in ("cpu", "eager"):
        value, slope = by_kernel(surrogate, u, backend, "cpu")
        assert_exact(value, u, lambda u: u / (1 + k * abs(u)) + 0.5, lambda u: True)
        assert_exact(slope, u, lambda u: 1 / (1 + k * abs(u)) ** 2, lambda u: False)


# --- numbers --------------------------------------------------------------------------------------


def test_numbers_by_name_or_in_order() -> None:
    s = nj.surrogates
    assert s.ATan(3.0) == s.ATan(alpha=3.0) != s.ATan
    assert s.S2NN(2.0, 0.5) == s.S2NN(alpha=2.0, beta=0.5) == s.S2NN(2.0, beta=0.5)
    assert s.ATan(3.0, spiking=False).params == {"alpha": 3.0}
    assert s.StraightThrough() == s.StraightThrough


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (lambda s: s.ATan(1.0, 2.0), nj.SpecError, "takes 1 numbers, got 2. Known: alpha"),
        (lambda s: s.ATan(1.0, alpha=2.0), nj.SpecError, r"\['alpha'\] given twice"),
        (lambda s: s.ATan(beta=1.0), nj.SpecError, "no parameter 'beta'. Known: alpha"),
        (lambda s: s.ATan(math.inf), nj.SpecError, "alpha must be finite, got inf"),
        (lambda s: s.ATan(math.nan), nj.SpecError, "alpha must be finite, got nan"),
        (lambda s: s.ATan(10**400), nj.SpecError, "alpha must be finite"),
        (lambda s: s.ATan([1.0]), nj.InputTypeError, "alpha must be a number, got"),
        (lambda s: s.ATan("3"), nj.InputTypeError, "alpha must be a number, got '3'"),
        (lambda s: s.ATan(True), nj.InputTypeError, "alpha must be a number, got True"),
        (lambda s: s.SuperSpike(spiking=False), nj.SpecError, "has no primitive"),
    ],
    ids=range(10),
)
def test_numbers_that_cannot_be(make: Any, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        make(nj.surrogates)


def test_minus_zero_is_another_number() -> None:
    """Equal ones share plans, and so the sign of their zeros."""
    plus, minus = (nj.surrogates.LeakyKReLU(leak=zero) for zero in (0.0, -0.0))
    assert plus != minus and plus == nj.surrogates.LeakyKReLU()
    for name in ("state", "params"):
        numbers = [{"v": 0.0} | ({"v": z} if name == "state" else {}) for z in (0.0, -0.0)]
        params = [{"v_reset": z} if name == "params" else {} for z in (0.0, -0.0)]
        plus, minus = (
            nj.NeuronModel("m", "h = v + x", state=s, params=p)
            for s, p in zip(numbers, params, strict=True)
        )
        assert plus != minus


# --- models and surrogates never change -----------------------------------------------------------

OURS = nj.NeuronModel(
    "ours", "h = v + x / tau", state={"v": 0.0}, params={"tau": 2.0}, positive=["tau"]
)
IMMUTABLE = [
    nj.neurons.LIF,
    nj.neurons.IZHIKEVICH,
    OURS,
    nj.surrogates.ATan,
    nj.surrogates.Sigmoid(alpha=3.0),
]
each_immutable = pytest.mark.parametrize("value", IMMUTABLE, ids=lambda value: value.name)


def everything(value: Any) -> Any:
    return {k: v if k == "form" else copy.deepcopy(v) for k, v in vars(value).items()}, hash(value)


@each_immutable
def test_no_attribute_can_be_set_or_deleted(value: Any) -> None:
    before = everything(value)
    for name in [*vars(value), "tau", "anything"]:
        with pytest.raises(nj.InputTypeError, match=f"cannot set '{name}': .* immutable"):
            setattr(value, name, getattr(value, name, 1.0))
        with pytest.raises(nj.InputTypeError, match=f"cannot delete '{name}': .* immutable"):
            delattr(value, name)
    assert everything(value) == before


@each_immutable
def test_no_collection_within_can_be_changed(value: Any) -> None:
    """Whatever the attribute, whatever the method that would change it."""
    before, tried = everything(value), 0
    mutators = {n for n in dir(MutableMapping) if hasattr(dict, n)} - set(dir(Mapping))
    for held in (*vars(value).values(), value.params):
        assert not isinstance(held, list | set | bytearray)
        if isinstance(held, Mapping):
            (name, number), tried = next(iter(held.items())), tried + 1
            arguments = {
                "__setitem__": (name, 9.0), "__delitem__": (name,), "__ior__": ({name: 9.0},),
                "pop": (name,), "update": ({name: 9.0},), "setdefault": ("new", 9.0),
            }  # fmt: skip
            for mutator in mutators:
                with pytest.raises(nj.InputTypeError, match="are immutable: "):
                    getattr(held, mutator)(*arguments.get(mutator, ()))
            assert (held[name], len(held)) == (number, len(dict(held)))
    assert tried and everything(value) == before


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda: nj.neurons.LIF.params.__setitem__("tau", 4.0),
         "models are immutable: pass tau=4.0 to the call or layer, or make a new NeuronModel"),
        (lambda: nj.neurons.LIF.state.__setitem__("v", 4.0),
         "models are immutable: pass state={...} to the call, or make a new NeuronModel"),
        (lambda: nj.surrogates.ATan.params.__setitem__("alpha", 9.0),
         "surrogates are immutable: ATan(alpha=9.0) gives another one"),
        (lambda: setattr(nj.surrogates.ATan, "spiking", False),
         "cannot set 'spiking': surrogates are immutable; call one to get another"),
    ],
    ids=range(4),
)  # fmt: skip
def test_refusals_say_what_to_do_instead(change: Callable[[], None], words: str) -> None:
    with pytest.raises(nj.InputTypeError) as caught:
        change()
    assert words in str(caught.value)


def test_what_the_constructor_was_given_may_change_afterwards() -> None:
    state, params, positive = {"v": 0.0}, {"tau": 2.0}, ["tau"]
    made = nj.NeuronModel("made", "h = v + x / tau", state=state, params=params, positive=positive)
    alpha = {"alpha": 1.0}
    surrogate = nj.Surrogate("mine", "alpha", "alpha * u", alpha)
    before = [everything(value) for value in (made, surrogate)]
    for given in (state, params, alpha):
        given.clear()
    positive.append("v_reset")
    assert [everything(value) for value in (made, surrogate)] == before


@pytest.mark.parametrize("how", ["pickle", "copy", "deepcopy", "torch.save"])
@each_immutable
def test_copies_are_equal_and_immutable_too(value: Any, how: str) -> None:
    if how == "torch.save":
        torch.save(value, buffer := io.BytesIO())
        buffer.seek(0)
        other = torch.load(buffer, weights_only=False)
    elif how == "pickle":
        other = pickle.loads(pickle.dumps(value))  # noqa: S301 -- our own
    else:
        other = getattr(copy, how)(value)
    assert other == value and hash(other) == hash(value) and repr(other) == repr(value)
    numbers = copy.deepcopy(other.params), pickle.loads(pickle.dumps(other.params))  # noqa: S301
    for held in (other.params, *numbers):
        assert held == value.params
        with pytest.raises(nj.InputTypeError, match="immutable"):
            held["tau"] = 9.0


@each_immutable
def test_numbers_go_into_json_and_keywords(value: Any) -> None:
    assert json.loads(json.dumps(value.params)) == dict(value.params) == dict(**value.params)
    assert type(value.params | {"other": 1.0}) is dict
    assert repr(value.params) == repr(dict(value.params))


def _spawned(model: nj.NeuronModel, surrogate: nj.Surrogate) -> tuple[Any, ...]:
    x = torch.full((3, 4), 0.8)
    out = nj.multistep(model, x, surrogate=surrogate, backend="eager")
    return model, surrogate, out.spikes.tolist()


def test_a_spawned_process_gets_and_returns_them() -> None:
    """Whose hashes of strings, and so of models, are others."""
    given = OURS, nj.surrogates.ATan(3.0)
    # not a multiprocessing.Pool, which may hang when it ends, or when its process does
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        *back, spikes = pool.submit(_spawned, *given).result(timeout=300)
    assert tuple(back) == given and [hash(b) for b in back] == [hash(g) for g in given]
    assert spikes == _spawned(*given)[2]


@pytest.mark.parametrize("kind", [float, torch.tensor])
def test_numbers_of_anothers_surrogate_are_read_at_each_call(kind: Callable[[float], Any]) -> None:
    """Also where they are those of an earlier call again, or change in place."""

    class Sigmoid:  # known by its name and attributes, as SpikingJelly's
        alpha, spiking = kind(1.0), True

    given = Sigmoid()
    for alpha in (2.0, 5.0, 2.0, 0.5):
        if isinstance(given.alpha, torch.Tensor):
            given.alpha.fill_(alpha)
        else:
            given.alpha = alpha
        x = torch.tensor([[0.3, 1.2]], requires_grad=True)  # [T, N] = [1, 2]
        nj.multistep("if", x, surrogate=given).spikes.sum().backward()
        spike = (alpha * (x.detach() - 1)).sigmoid()
        torch.testing.assert_close(x.grad, alpha * spike * (1 - spike))
