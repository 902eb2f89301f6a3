"""Many processes: DDP, FSDP, and the example, by torchrun with gloo on the CPU."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent

COMMON = """
import torch, torch.distributed as dist
import neuronjit as nj

def network(**options):
    torch.manual_seed(0)
    return torch.nn.Sequential(
        torch.nn.Linear(6, 8), nj.nn.LIF(learnable=("tau", "v_threshold"), channels=8),
        torch.nn.Linear(8, 5), nj.nn.PLIF(**options),
    )

def batch():
    return torch.rand(20, 8, 6, generator=torch.Generator().manual_seed(1)) * 3 - 0.5

def loss(net, x):
    nj.nn.reset_net(net)
    return (net(x) - 0.5).square().mean()

torch.set_num_threads(1)
dist.init_process_group("gloo")
rank, world = dist.get_rank(), dist.get_world_size()
mine = batch()[:, rank::world]
"""

DDP = """
from torch.nn.parallel import DistributedDataParallel
plain = network()
loss(plain, batch()).backward()
for options in ({}, {"static_graph": True}, {"find_unused_parameters": True},
                {"gradient_as_bucket_view": True}):
    net = DistributedDataParallel(network(), **options)
    for _ in range(2):  # static_graph learns the graph in the first
        net.zero_grad()
        loss(net, mine).backward()
    for (name, p), q in zip(net.module.named_parameters(), plain.parameters(), strict=True):
        assert q.grad.abs().max() > 0, name
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-4, atol=1e-6, msg=f"{options} {name}")
fast = torch.compile(DistributedDataParallel(network()), backend="aot_eager")
loss(fast, mine).backward()
for p, q in zip(fast.parameters(), plain.parameters(), strict=True):
    torch.testing.assert_close(p.grad, q.grad, rtol=1e-4, atol=1e-6)
"""

FSDP = """
from torch.distributed.fsdp import fully_shard
from torch.distributed.device_mesh import init_device_mesh
# fully_shard takes no 0-dim parameters: one for each channel
plain = network(channels=5)
reference = torch.optim.SGD(plain.parameters(), lr=0.1)
net = network(channels=5)
mesh = init_device_mesh("cpu", (world,))
fully_shard(net[1], mesh=mesh)  # the neurons' own parameters, in shards of their own
fully_shard(net, mesh=mesh)
optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
for _ in range(3):
    for one, opt, x in ((plain, reference, batch()), (net, optimizer, mine)):
        opt.zero_grad()
        loss(one, x).backward()
        opt.step()
for (name, p), q in zip(net.named_parameters(), plain.parameters(), strict=True):
    torch.testing.assert_close(p.full_tensor(), q, rtol=1e-4, atol=1e-6, msg=name)
"""


def torchrun(processes: int, *command: str, cwd: Path) -> str:
    path = [str(ROOT), str(ROOT / "examples"), os.environ.get("PYTHONPATH", "")]
    environment = {
        **os.environ, "PYTHONPATH": os.pathsep.join(filter(None, path)), "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
    }  # fmt: skip
    run = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    done = subprocess.run(
        [*run, "--nproc-per-node", str(processes), *command],
        cwd=cwd, env=environment, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]
    return done.stdout


def script(tmp_path: Path, text: str) -> str:
    path = tmp_path / "script.py"
    path.write_text(
        # why it leaves so: see examples/train_ddp.py
        f"{COMMON}\n{text}\nprint('rank', rank, 'done', flush=True)\n"
        "dist.barrier()\ndist.destroy_process_group()\nimport os\nos._exit(0)\n"
    )
    return str(path)


@pytest.mark.slow
@pytest.mark.parametrize("processes", [2, 4])
def test_ddp_has_the_gradients_of_one_process(tmp_path: Path, processes: int) -> None:
    said = torchrun(processes, script(tmp_path, DDP), cwd=tmp_path)
    assert said.count("done") == processes


@pytest.mark.slow
@pytest.mark.skipif(
    not hasattr(torch.cpu.Stream, "record_event"),
    reason="fully_shard runs on no CPU in torch 2.6, also of one torch.nn.Linear",
)
def test_fsdp_learns_what_one_process_learns(tmp_path: Path) -> None:
    said = torchrun(2, script(tmp_path, FSDP), cwd=tmp_path)
    assert said.count("done") == 2


@pytest.mark.slow
def test_the_example_scales_by_torchrun(tmp_path: Path) -> None:
    """The same losses with one process and two (but for batch normalisation); compiled once."""
    pytest.importorskip("sklearn", reason="the example needs scikit-learn")
    pytest.importorskip("matplotlib", reason="digits.py needs matplotlib")
    example = str(ROOT / "examples" / "train_ddp.py")
    for processes in (1, 2):
        said = torchrun(
            processes, example, "--device", "cpu", "--epochs", "2", "--time-steps", "4",
            cwd=tmp_path,
        )  # fmt: skip
        accuracies = [float(a) for a in re.findall(r"test accuracy +([\d.]+)%", said)]
        assert len(accuracies) == 2 and accuracies[-1] > 60, said
        assert len(re.findall(r"^rank \d of \d on cpu", said, re.M)) == processes
        compiled = sum(map(int, re.findall(r"(\d+) kernels compiled", said)))
        assert (compiled == 0) == (processes == 2), said
