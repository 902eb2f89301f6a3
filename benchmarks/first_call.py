"""`first_call.py PEER DEVICE`: seconds of a fresh process from an imported torch to spikes."""

import json
import sys
import time


def main(peer: str, device: str) -> None:
    begin = time.perf_counter()
    import torch

    torch.zeros(1, device=device)  # creates the context
    if device == "cuda":
        torch.cuda.synchronize()
        if peer == "neuronjit":  # the time of this import is CuPy's own
            import cupy  # noqa: F401
    from peers import PEERS, Work

    work = Work("lif", "fp32", 4, 65536)
    x = torch.randn(work.T, work.N, device=device, requires_grad=True)
    ready = time.perf_counter()
    stages = {"torch_s": ready - begin}

    def stage(name: str) -> None:
        if device == "cuda":
            torch.cuda.synchronize()
        stages[name] = time.perf_counter() - ready

    call = PEERS[peer](work, device, work.T)
    stage("imported_s")
    spikes = call.forward(x)
    stage("first_spikes_s")
    spikes.sum().backward()
    stage("first_gradient_s")
    print(json.dumps(stages))


if __name__ == "__main__":
    main(*sys.argv[1:])
