"""torch.compile and torch.export: one operator, no graph break, the bits of an eager call."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from support import Counted, each_device, inputs, library_model, slow
from torch import Tensor
from torch.fx.experimental import symbolic_shapes

import neuronjit as nj
from neuronjit.run import graph
from neuronjit.run.call import Call

pytestmark = pytest.mark.filterwarnings("ignore:.*(TF32|deprecated|isinstance_treespec)")
numbers_as_inputs = pytest.mark.skipif(
    not hasattr(symbolic_shapes, "has_static_value"),
    reason="this torch does not tell which numbers change: each makes a graph",
)


@pytest.fixture(autouse=True)
def fresh(tmp_path_factory: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """No graph of an earlier test, in memory or on disk."""
    torch._dynamo.reset()
    cache = tmp_path_factory.getbasetemp() / "inductor"
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(cache))


def compiled(function: Any, backend: str = "aot_eager", **options: Any) -> Any:
    """aot_eager traces and differentiates as the default does, and saves the C++ compiler."""
    return torch.compile(function, fullgraph=True, backend=backend, **options)


def same(function: Callable[..., Any], other: Callable[..., Any], *leaves: Any) -> None:
    """Equal outputs, bit for bit, and equal gradients of all leaves that want one."""
    results = []
    for run in (function, other):
        given = [t.detach().clone().requires_grad_(t.requires_grad) for t in leaves]
        outputs = run(*given)
        outputs = [outputs] if isinstance(outputs, Tensor) else list(outputs)
        asked = [t for t in given if t.requires_grad]
        loss = sum(o.double().square().sum() for o in outputs)
        results.append((outputs, torch.autograd.grad(loss, asked) if asked else ()))
    for (a, b), what in zip(zip(*results, strict=True), ("output", "gradient"), strict=True):
        for i, (mine, eager) in enumerate(zip(a, b, strict=True)):
            assert mine.dtype == eager.dtype and mine.stride() == eager.stride(), f"{what} {i}"
            if what == "output":
                assert torch.equal(mine, eager), f"{what} {i}"
            else:  # sums are ordered otherwise where a number became a tensor
                torch.testing.assert_close(mine, eager, rtol=1e-5, atol=1e-6)


# --- torch.compile --------------------------------------------------------------------------------


@each_device
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_a_network(backend: str, device: str) -> None:
    torch.manual_seed(0)
    layers = [nj.nn.LIF(tau=1.7), torch.nn.Linear(9, 5), nj.nn.PLIF(), nj.nn.Izhikevich()]
    net = torch.nn.Sequential(torch.nn.Linear(6, 9), *layers).to(device)
    fast = compiled(net, backend)
    x = inputs((20, 4, 6)).to(device).requires_grad_()
    grads = []
    for run in (net, fast, fast):
        nj.nn.reset_net(net)
        net.zero_grad()
        out = run(x)
        out.square().sum().backward()
        grads.append([out, x.grad, *[p.grad for p in net.parameters()]])
        x.grad = None
    for other in grads[1:]:
        for a, b in zip(grads[0], other, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@each_device
def test_a_state_that_is_carried(device: str) -> None:
    """Cut between steps: one graph that starts anew, one that goes on; the losses of eager steps.

    A batch of another size starts anew, as in eager mode.
    """
    losses = []
    with Counted() as counted:
        for fast in (False, True):
            torch.manual_seed(0)
            net = torch.nn.Sequential(torch.nn.Linear(6, 9), nj.nn.LIF(tau=3.0, v_threshold=0.3))
            run = compiled(net.to(device)) if fast else net.to(device)
            optimizer = torch.optim.SGD(net.parameters(), lr=0.5)
            losses.append([])
            for seed, count in enumerate((4, 4, 4, 7, 7)):
                nj.nn.detach_net(net)
                optimizer.zero_grad()
                loss = (run(inputs((5, count, 6), seed=seed).to(device)).mean() - 0.1).square()
                loss.backward()
                optimizer.step()
                losses[-1].append(loss.item())
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
    assert len(set(losses[0])) == 5
    assert counted.graphs <= 4


@each_device
@pytest.mark.parametrize(
    "model", [slow("IF"), slow("LIF"), "PLIF", slow("EIF"), "IZHIKEVICH", "alif"]
)
def test_models(model: str, device: str) -> None:
    """Outputs, last states and records; checkpoints from 20 steps; a model of one's own."""

    own = library_model(model)

    def run(x: Tensor, v: Tensor) -> list[Tensor]:
        out = nj.multistep(own, x, {"v": v}, record=("h", "v"), detach_reset=True)
        return [out.spikes, *out.state.values(), *out.record.values()]

    x = inputs((20, 3, 5)).to(device).requires_grad_()
    same(compiled(run), run, x, torch.full((3, 5), 0.2, device=device, requires_grad=True))


@pytest.mark.parametrize(
    ("dtype", "reset"),
    [
        (torch.float64, "hard"), (torch.float16, "soft"), slow(torch.bfloat16, "hard"),
        slow(torch.float64, "soft"), slow(torch.float16, "hard"), slow(torch.bfloat16, "soft"),
    ],
)  # fmt: skip
def test_dtypes_and_resets(dtype: torch.dtype, reset: str) -> None:
    def run(x: Tensor) -> tuple[Tensor, Tensor]:
        out = nj.multistep(nj.neurons.LIF, x, reset=reset, surrogate=nj.surrogates.Sigmoid)
        return out.spikes, out.state["v"]

    same(compiled(run), run, inputs((20, 5), dtype).requires_grad_())


def test_tensor_parameters_learn() -> None:
    def run(x: Tensor, tau: Tensor, threshold: Tensor) -> Tensor:
        return nj.multistep(nj.neurons.LIF, x, tau=tau, v_threshold=threshold).spikes

    tau = torch.tensor(1.8, requires_grad=True)
    threshold = (torch.rand(3, 1) * 0.2 + 0.8).requires_grad_()
    same(compiled(run), run, inputs((20, 3, 5)).requires_grad_(), tau, threshold)


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "channels_last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "transposed": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    "sliced": lambda x: torch.cat((x, x), -1)[..., ::2],
    "expanded": lambda x: x[:, :1].expand(-1, 3, -1, -1),
}


@pytest.mark.parametrize(
    ("kind", "backend"),
    [*((kind, "aot_eager") for kind in LAYOUTS), *(slow(kind, "inductor") for kind in LAYOUTS)],
)
def test_layouts(kind: str, backend: str) -> None:
    """Inside a graph too: what the fake kernel promises is what the kernel gives."""

    def run(x: Tensor) -> list[Tensor]:
        out = nj.multistep(nj.neurons.LIF, LAYOUTS[kind](x * 1.5), record=("h",))
        return [t + 0.25 for t in (out.spikes, out.state["v"], out.record["h"])]

    x = inputs((6, 3, 4, 2)).requires_grad_()
    results = [(o, torch.autograd.grad(sum(t.square().sum() for t in o), x)[0])
               for o in (compiled(run, backend)(x), run(x))]  # fmt: skip
    torch.testing.assert_close(*results)


def test_inductor_and_batch_sizes_of_sequences_of_vectors() -> None:
    """[T, N, C, L] among convolutions: saved in four dimensions, it makes Inductor 2.13 fail."""

    class Net(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.first, self.last = torch.nn.Conv1d(3, 4, 1), torch.nn.Conv1d(4, 2, 1)
            self.lif = nj.nn.LIF(v_threshold=0.2, learnable="tau", channels=4)

        def forward(self, x: Tensor) -> Tensor:
            y = self.first(3 * x.flatten(0, 1)).unflatten(0, x.shape[:2])
            return self.last(self.lif(y).flatten(0, 1))

    net = Net().double()
    fast = compiled(net, "inductor")
    with Counted() as counted:
        for count in (3, 5, 2, 7):
            x = inputs((4, count, 3, 5), torch.float64, seed=count)
            results = []
            for run in (net, fast):
                net.lif.reset()
                out = run(x)
                grads = torch.autograd.grad(out.square().sum(), [*net.parameters()])
                results.append([out, net.lif.v, *grads])
            assert all(grad.any() for grad in results[0])
            torch.testing.assert_close(*results)
    assert counted.graphs == 2


@numbers_as_inputs
def test_a_number_that_changes_makes_one_more_graph_at_most() -> None:
    """The first other number makes it an input of the graph; from then on, nothing is made."""

    def run(x: Tensor, tau: float, threshold: float) -> Tensor:
        return nj.multistep(nj.neurons.LIF, x, tau=tau, v_threshold=threshold).spikes

    fast, x = compiled(run), inputs((20, 5)).requires_grad_()
    with Counted() as counted:
        for i, (tau, threshold) in enumerate(
            [(2.0, 1.0), (1.5, 0.9), (1.7, 0.8), (3.0, 1.1), (2.5, 0.7)]
        ):
            same(
                lambda x, p=(tau, threshold): fast(x, *p),
                lambda x, p=(tau, threshold): run(x, *p),
                x,
            )
            assert counted.graphs == min(i + 1, 2)
    with Counted() as counted:
        dynamic = compiled(run, dynamic=True)
        for tau in (2.0, 1.5, 1.25):
            dynamic(x, tau, 1.0)
        assert counted.graphs <= 2


@numbers_as_inputs
def test_a_layers_number_that_changes() -> None:
    layer = nj.nn.LIF(tau=2.0)
    fast, x = compiled(layer), inputs((20, 5)).requires_grad_()
    counts = []
    with Counted() as counted:
        for tau in (2.0, 1.5, 1.7, 3.0, 2.5):
            layer.tau = tau
            layer.reset()
            want = nj.multistep("lif", x, tau=tau, surrogate=layer.surrogate_function).spikes
            assert torch.equal(fast(x), want)
            counts.append(counted.graphs)
    assert counts[-1] == counts[1], counts


@numbers_as_inputs
def test_a_surrogates_number_that_changes() -> None:
    def run(x: Tensor, surrogate: nj.Surrogate) -> Tensor:
        return nj.multistep(nj.neurons.LIF, x, surrogate=surrogate).spikes

    fast, x = compiled(run), inputs((20, 5)).requires_grad_()
    with Counted() as counted:
        for alpha in range(1, 12):
            atan = nj.surrogates.ATan(alpha=alpha / 2)
            same(lambda x, s=atan: fast(x, s), lambda x, s=atan: run(x, s), x)
        assert counted.graphs == 2


@pytest.mark.cuda
def test_graphs_of_cuda_inside_torch_compile() -> None:
    """mode="reduce-overhead": the kernels are captured with all others."""
    torch.manual_seed(0)
    net = torch.nn.Sequential(
        torch.nn.Linear(6, 9), nj.nn.LIF(learnable="tau"), torch.nn.Linear(9, 5)
    )
    net = net.cuda()
    fast = torch.compile(net, fullgraph=True, mode="reduce-overhead")
    for seed in range(6):
        x = inputs((20, 4, 6), seed=seed).cuda()
        grads = []
        for run in (net, fast):
            nj.nn.reset_net(net)
            net.zero_grad()
            torch.compiler.cudagraph_mark_step_begin()
            run(x).square().sum().backward()
            grads.append([p.grad.clone() for p in net.parameters()])
        for a, b in zip(*grads, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


@each_device
def test_dynamic_shapes(device: str) -> None:
    """Any T and N from few graphs: with checkpoints, without, and no more."""

    def run(x: Tensor) -> list[Tensor]:
        out = nj.multistep(nj.neurons.LIF, x, record=("h",))
        return [out.spikes, out.state["v"], out.record["h"]]

    fast = compiled(run, dynamic=True)
    with Counted() as counted:
        for t, n in ((4, 5), (20, 5), (33, 5), (17, 6), (7, 9), (9, 64), (50, 3)):
            same(fast, run, inputs((t, n, 2)).to(device).requires_grad_())
        assert counted.graphs == 1


@pytest.mark.parametrize("shape", [(0, 3), (4, 0), (1, 3), (4, 1), (5,)])
def test_small_and_empty_shapes(shape: tuple[int, ...]) -> None:
    def run(x: Tensor) -> list[Tensor]:
        out = nj.multistep(nj.neurons.LIF, x)
        return [out.spikes * 1, out.state["v"] * 1]

    same(compiled(run), run, inputs(shape).requires_grad_())


def test_inference_saves_nothing_and_backend_is_asked_for() -> None:
    for backend in (None, "cpu", "eager"):
        torch._dynamo.reset()

        def run(x: Tensor, backend: str | None = backend) -> Tensor:
            return nj.multistep(nj.neurons.LIF, x, backend=backend).spikes

        x = inputs((20, 5))
        for mode in (torch.no_grad, torch.inference_mode):
            with mode():
                assert torch.equal(compiled(run)(x), run(x))
        same(compiled(run), run, x.requires_grad_())


def test_errors_are_told() -> None:
    def unknown(x: Tensor) -> Tensor:
        return nj.multistep(nj.neurons.LIF, x, taw=2.0).spikes

    def misshapen(x: Tensor) -> Tensor:
        return nj.multistep(nj.neurons.LIF, x, {"v": torch.zeros(3)}).spikes

    for run in (unknown, misshapen):
        with pytest.raises(Exception, match=r"taw|\(3,\)|SpecError"):
            compiled(run)(inputs((4, 8)))


def test_checkpointing_and_autocast_inside() -> None:
    from torch.utils.checkpoint import checkpoint

    def body(x: Tensor) -> Tensor:
        return nj.multistep(nj.neurons.LIF, x @ torch.eye(5)).spikes

    def run(x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return checkpoint(body, x, use_reentrant=False)

    x = inputs((20, 3, 5)).requires_grad_()
    out = compiled(run)(x)
    assert out.dtype == torch.bfloat16 and torch.equal(out, run(x))


# --- operators and export -------------------------------------------------------------------------


def arguments(
    model: str, x: Tensor, tensors: dict[str, Tensor], *, record: Sequence[str] = (),
    final: bool = True, spiking: bool = True, backend: str | None = None, save: bool = True,
) -> tuple[Any, ...]:  # fmt: skip
    own, surrogate = library_model(model), nj.surrogates.ATan(spiking=spiking)
    numbers = [v for n, v in {**own.state, **own.params}.items() if n not in tensors]
    call = Call(own, surrogate, "hard", False, tuple(record), final, "auto")
    text = graph.to_text(call, backend, list(tensors), [])
    return x, list(tensors.values()), [*numbers, *surrogate.values], save, text


def wanted(tensor: Tensor) -> Tensor:
    return tensor.requires_grad_()


OPERATORS: dict[str, Callable[[], tuple[Any, ...]]] = {
    "plain": lambda: arguments("LIF", wanted(inputs((4, 8))), {}),
    "checkpoints": lambda: arguments("LIF", wanted(inputs((20, 8))), {}, record=("v", "h")),
    "three states": lambda: arguments("refractory", wanted(inputs((20, 8))), {}, record=("h",)),
    "learned": lambda: arguments(
        "LIF", wanted(inputs((20, 3, 8))),
        {"v": wanted(torch.rand(3, 8)), "tau": wanted(torch.tensor(2.0))},
    ),
    "half": lambda: arguments(
        "LIF", wanted(inputs((20, 3, 8), torch.float16)), {"tau": wanted(torch.rand(8).half() + 1)},
        final=False,
    ),
    "time inside": lambda: arguments("LIF", wanted(inputs((8, 20, 2)).transpose(0, 1)), {}),
    "channels_last": lambda: arguments(
        "IF", wanted(inputs((5, 3, 4, 2)).contiguous(memory_format=torch.channels_last)), {}
    ),
    "sliced": lambda: arguments(
        "LIF", wanted(inputs((20, 8, 2))[:, ::2]), {"v": wanted(torch.tensor(0.5))}
    ),
    "smooth": lambda: arguments("LIF", wanted(inputs((4, 8))), {}, spiking=False),
    "inference": lambda: arguments("LIF", inputs((20, 8)), {}, save=False),
    "eager": lambda: arguments("LIF", wanted(inputs((20, 8))), {}, backend="eager"),
    "empty": lambda: arguments("LIF", wanted(inputs((4, 0))), {}),
    "izhikevich": lambda: arguments(
        "IZHIKEVICH", wanted(inputs((20, 8))), {"w": torch.rand(8)}, record=("w",)
    ),
}  # fmt: skip


@each_device
@pytest.mark.parametrize("case", OPERATORS)
def test_opcheck(case: str, device: str) -> None:
    """torch's own test: schema, registration, fake kernel, tracing with gradients."""

    def moved(t: Any) -> Any:
        return t.detach().to(device).requires_grad_(t.requires_grad) if isinstance(t, Tensor) else t

    x, tensors, *rest = OPERATORS[case]()
    torch.library.opcheck(
        torch.ops.neuronjit.forward.default, (moved(x), [moved(t) for t in tensors], *rest)
    )


@each_device
def test_opcheck_of_statistics(device: str) -> None:
    x = inputs((4, 3, 6, 2)).to(device)
    own = [torch.zeros(6, device=device), torch.ones(6, device=device)]
    for given in ((*own, torch.tensor(1, device=device)), (None, None, None)):
        for momentum in (0.1, None):
            asked = (x, 1e-5, *given, momentum, None)
            torch.library.opcheck(torch.ops.neuronjit.statistics.default, asked)


@each_device
@pytest.mark.parametrize("size", [1, 6])
def test_results_have_memory_of_their_own(size: int, device: str) -> None:
    """Inductor takes them to be aligned, and apart from each other."""
    params = {name: torch.rand(size).add_(1.5).to(device) for name in ("tau", "v_threshold")}
    x, tensors, numbers, save, text = arguments("LIF", inputs((4, 3, 6)).to(device), params)
    *outputs, checkpoints = torch.ops.neuronjit.forward(x, tensors, numbers, save, text)
    grads = [torch.ones_like(outputs[0]), *(None for _ in outputs[1:])]
    wanted = [True for _ in (x, *tensors)]
    results = torch.ops.neuronjit.backward(x, checkpoints, tensors, grads, numbers, wanted, text)
    found = [*results, *outputs, checkpoints]
    assert len(found) == 6 and not any(t.storage_offset() for t in found)
    assert len({t.untyped_storage().data_ptr() for t in found}) == len(found)


class Net(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.dense = torch.nn.Linear(6, 5)
        self.spiking = nj.nn.LIF(tau=1.5, learnable="v_threshold")

    def forward(self, x: Tensor) -> Tensor:
        spikes, _ = self.spiking.functional_forward(self.dense(x))
        return spikes.mean(0)


def exported(strict: bool, **options: Any) -> tuple[Net, Any]:
    torch.manual_seed(0)
    net = Net()
    return net, torch.export.export(net, (inputs((5, 3, 6)),), strict=strict, **options)


@pytest.mark.parametrize("strict", [True, False])
def test_export(strict: bool) -> None:
    dim = torch.export.Dim
    shapes = {"x": {0: dim("T", min=2, max=64), 1: dim("N", min=2, max=64)}}
    net, program = exported(strict, dynamic_shapes=shapes)
    assert "neuronjit.forward" in program.graph_module.code
    for t, n in ((5, 3), (20, 4), (40, 2)):
        x = inputs((t, n, 6))
        assert torch.equal(program.module()(x), net(x))


def test_an_exported_program_runs_in_another_process(tmp_path: Path) -> None:
    net, program = exported(False)
    x = inputs((5, 3, 6))
    torch.export.save(program, tmp_path / "net.pt2")
    torch.save((x, net(x).detach()), tmp_path / "data.pt")
    code = (
        "import torch, neuronjit.run.graph\n"
        "x, want = torch.load('data.pt')\n"
        "assert torch.equal(torch.export.load('net.pt2').module()(x), want)\n"
    )
    path = str(Path(nj.__file__).parent.parent)
    done = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path.insert(0, {path!r})\n{code}"],
        cwd=tmp_path, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


def test_operators_of_another_version_are_refused() -> None:
    x, tensors, numbers, save, call = OPERATORS["plain"]()
    older = call.replace(f'"neuronjit": {graph.VERSION}', '"neuronjit": 1')
    for text, version in ((older, r"\(1\)"), ("neuronjit 1\n{}", "older"), ("[]", "older")):
        with pytest.raises(nj.SpecError, match=f"another version.*{version}"):
            torch.ops.neuronjit.forward(x, tensors, numbers, save, text)


REMARKED = r'''
    # don't stop ''' + "'''" + r''' here: */ \n " \
    h = v + \
        (x
         - 0.5 * v)  # a "quoted" `remark` */
'''  # fmt: skip


def test_the_text_in_a_graph_can_stand_in_any_comment() -> None:
    """Inductor copies it into comments of Triton and C++: a line end or a quote would end them."""
    model = nj.NeuronModel("remarked", REMARKED, state={"v": 0.0})
    slope = "where(u < 0, alpha, 1)  # it's \\n"
    surrogate = nj.Surrogate("remarked", slope, "alpha * u  # '''", dict(alpha=1.0))
    seen = []

    def look(module: torch.fx.GraphModule, _: Any) -> Any:
        seen.extend(a for n in module.graph.nodes for a in n.args if isinstance(a, str))
        return module

    def run(x: Tensor) -> Tensor:
        return nj.multistep(model, x, surrogate=surrogate, record=("v", "h")).spikes

    x = inputs((5, 3)).requires_grad_()
    torch.compile(run, fullgraph=True, backend=look)(x)
    (text,) = seen
    assert text.isascii() and text.isprintable() and not set(text) & set("\\'`#")
    assert "*/" not in text and "//" not in text
    same(compiled(run, "inductor"), run, x)


def test_a_second_derivative_of_an_operator_is_a_clear_error() -> None:
    x, *rest = OPERATORS["plain"]()
    spikes = torch.ops.neuronjit.forward(x, *rest)[0]
    (grad,) = torch.autograd.grad(spikes.sum(), x, create_graph=True)
    with pytest.raises(nj.DifferentiationError, match="eager"):
        grad.sum().backward()
