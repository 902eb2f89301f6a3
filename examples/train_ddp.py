"""Train the network of digits.py on any number of processes: torchrun decides how many.

    torchrun --nproc-per-node 4 examples/train_ddp.py                 # 4 GPUs, or 4 CPU processes
    torchrun --nnodes 2 --nproc-per-node 8 --rdzv-endpoint host:29500 examples/train_ddp.py

Each process compiles nothing that another one of its machine has compiled. The batch is divided
among the processes, so the result does not depend on their number, but for rounding and batch
normalisation (SyncBatchNorm on GPUs; on CPUs each process normalises its own part).
"""

import os
import sys
import time
from functools import partial

import torch
import torch.distributed as dist
from digits import accuracy, answer, arguments, constant_current, load, make_net
from torch import nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

import neuronjit as nj


def train_epoch(net, optimizer, images, labels, encode, batch, generator):
    """One pass; every process draws the same order and takes its part of each batch."""
    net.train()
    rank, world = dist.get_rank(), dist.get_world_size()
    total = torch.zeros((), device=images.device)
    for chosen in torch.randperm(len(images), generator=generator).split(batch):
        mine = chosen[rank::world].to(images.device)
        if len(chosen) < world:  # the last few images: all processes must go on together
            continue
        nj.nn.reset_net(net)
        said = answer(net, encode(images[mine]))
        # DDP averages gradients over processes: this makes it the mean over the whole batch
        loss = F.cross_entropy(said, labels[mine], reduction="sum") * world / len(chosen)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        total += loss.detach() * len(chosen) / world
    dist.all_reduce(total)
    return total.item() / len(images)


def main():
    parser = arguments(__doc__.splitlines()[0], epochs=10)
    parser.add_argument("--time-steps", type=int, default=8)
    parser.add_argument("--neuron", default="plif")
    parser.add_argument("--batch", type=int, default=64, help="of all processes together")
    args = parser.parse_args()
    local = int(os.environ.get("LOCAL_RANK", 0))
    if "RANK" not in os.environ:  # python examples/train_ddp.py: one process
        alone = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": "0"}
        os.environ |= alone
    cuda = args.device != "cpu" and torch.cuda.is_available()
    device = torch.device("cuda", local) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if cuda else "gloo")
    try:
        run(args, device)
        dist.barrier()
    finally:
        dist.destroy_process_group()
    if not cuda:
        # gloo's threads may hold tensors until Python is gone, and then abort the process (torch
        # 2.13; https://github.com/pytorch/pytorch/pull/179291): leave without waiting for them
        sys.stdout.flush()
        os._exit(0)


def run(args, device):
    first = dist.get_rank() == 0
    torch.manual_seed(args.seed)
    net = make_net(args.neuron).to(device)
    if device.type == "cuda":
        net = nn.SyncBatchNorm.convert_sync_batchnorm(net)
    net = DistributedDataParallel(net, device_ids=[device.index] if device.type == "cuda" else None)
    images, labels, *test = load(str(device))
    optimizer = torch.optim.Adam(net.parameters(), lr=2e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, args.epochs)
    encode = partial(constant_current, time_steps=args.time_steps)
    generator = torch.Generator().manual_seed(args.seed)
    for epoch in range(1, args.epochs + 1):
        start = time.perf_counter()
        loss = train_epoch(net, optimizer, images, labels, encode, args.batch, generator)
        schedule.step()
        if first:
            right = accuracy(net.module, *test, encode)
            seconds = time.perf_counter() - start
            print(f"epoch {epoch:2}  loss {loss:.3f}  test accuracy {right:6.2%}  {seconds:.2f} s")
    kernels = nj.stats()
    print(
        f"rank {dist.get_rank()} of {dist.get_world_size()} on {device}:"
        f" {kernels['compiled']} kernels compiled, {kernels['loaded']} loaded"
    )


if __name__ == "__main__":
    main()
