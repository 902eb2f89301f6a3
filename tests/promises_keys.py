"""P10 as an experiment: the same input gives the same key everywhere, another input another key."""

from __future__ import annotations

import dataclasses
import itertools
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

from cachekit import ROOT, patched

import neuronjit as nj
from neuronjit.cache import entries, store
from neuronjit.kernels import spec as spec_module
from neuronjit.kernels.spec import KernelSpec
from neuronjit.kernels.targets import cpu

TOOLCHAIN = {"arch": "x86-64-v3", "compiler": "g++ 12.2", "flags": "-O3", "abi": "glibc 2.36"}


def specs(number=200):
    models = [
        getattr(nj.neurons, name) for name in ("IF", "LIF", "PLIF", "QIF", "EIF", "IZHIKEVICH")
    ]
    surrogates = [nj.surrogates.ATan(), nj.surrogates.Sigmoid(spiking=False)]
    choices = itertools.product(
        models,
        ("cpu", "cuda"),
        ("forward", "backward"),
        surrogates,
        ("hard", "soft"),
        (False,),
        ("float32", "float16", "bfloat16"),
    )
    return [KernelSpec.of(*choice) for choice in itertools.islice(choices, number)]


def keys():
    return [store.make_key(spec.request, TOOLCHAIN) for spec in specs()]


def p10_keys(directory):
    """200 specs in three processes; then every input of a key changed, one at a time."""
    spec_module._renderer.cache_clear()  # as new processes see the files
    here = keys()
    code = f"import sys; sys.path[:0] = {[str(ROOT), str(ROOT / 'tests')]!r}\n"
    code += "import promises_keys\nprint(*promises_keys.keys())"
    stable = len(set(here))
    for seed in (1, 2):
        done = subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "PYTHONHASHSEED": str(seed), "TMPDIR": str(directory)},
            cwd=directory,
            capture_output=True,
            text=True,
            check=True,
        )
        stable = min(stable, sum(map(str.__eq__, done.stdout.split(), here)))
    changed = dict(_changed(directory))
    return {
        "specs": len(here),
        "the same in all processes": stable,
        "inputs": len(changed),
        "that change the key": sum(changed.values()),
        "that do not": [name for name, other in changed.items() if not other],
    }


def _changed(directory):
    spec_module._renderer.cache_clear()
    spec = KernelSpec(nj.neurons.LIF, "cpu", "backward", "float32", "hard", nj.surrogates.ATan())
    before = store.make_key(spec.request, TOOLCHAIN)

    def request():
        spec_module._renderer.cache_clear()
        return dataclasses.replace(spec).request

    copy = Path(shutil.copytree(spec_module.templates(), Path(directory, "templates")))
    with patched(spec_module, templates=lambda: copy):
        assert request() == spec.request
        for template in sorted(copy.iterdir()):
            text = template.read_bytes()
            template.write_bytes(text[:-1] + b" ")
            yield template.name, request() != spec.request
            template.write_bytes(text)
    package = Path(shutil.copytree(spec_module.PACKAGE, Path(directory, "package")))
    with patched(spec_module, PACKAGE=package, templates=lambda: copy):
        assert request() == spec.request
        for folder in spec_module.RENDERERS:
            for code in sorted((package / folder).rglob("*.py")):
                text = code.read_bytes()
                code.write_bytes(text + b"#")
                yield f"{folder}/{code.name}", request() != spec.request
                code.write_bytes(text)
    spec_module._renderer.cache_clear()
    equations = "h = v + (x - v) / tau"
    mine = nj.NeuronModel("mine", equations, state={"v": 0.0}, params={"tau": 2.0})
    other = nj.NeuronModel("mine", equations + " + 0", state={"v": 0.0}, params={"tau": 2.0})
    one, two = (dataclasses.replace(spec, model=model).request for model in (mine, other))
    yield "equations", one != two
    for field, value in {
        "model": nj.neurons.IF,
        "target": "cuda",
        "dtype": "float16",
        "reset": "soft",
        "surrogate": nj.surrogates.Sigmoid(),
        "spiking": False,
        "detach_reset": True,
        "per_neuron": ("tau",),
        "learned": ("tau",),
        "arriving": ("v",),
        "interval": 8,
        "lanes": 2,
        "loads": 2,
        "prefetch": True,
        "whole": True,
    }.items():
        yield f"spec: {field}", dataclasses.replace(spec, **{field: value}).request != spec.request
    two = nj.NeuronModel("two", "h = v + x * g", state={"v": 0.0}, inputs=("x", "g"))
    for field, value, plain in (
        ("by_channel", True, dataclasses.replace(spec, per_neuron=("tau",))),
        ("per_step", ("g",), dataclasses.replace(spec, model=two)),
    ):
        yield (
            f"spec: {field}",
            dataclasses.replace(plain, **{field: value}).request != plain.request,
        )
    smooth = [  # both directions have a surrogate only where it is smooth
        dataclasses.replace(spec, spiking=False, direction=direction).request
        for direction in ("forward", "backward")
    ]
    yield "spec: direction", smooth[0] != smooth[1]
    recorded = dataclasses.replace(spec, spiking=False, direction="forward", record=("v",))
    yield "spec: record", recorded.request != smooth[0]
    for name, value in TOOLCHAIN.items():
        toolchain = {**TOOLCHAIN, name: value + "a"}  # sm_90 and sm_90a are two as well
        yield f"toolchain: {name}", store.make_key(spec.request, toolchain) != before
    with patched(entries, SCHEMA=entries.SCHEMA + 1):
        yield "schema", store.make_key(spec.request, TOOLCHAIN) != before
    if platform.machine() != "x86_64":
        return
    archs = set()
    for features in itertools.accumulate(reversed(cpu._X86_LEVELS.values()), set.union):
        with patched(cpu, _cpu_flags=lambda features=features: frozenset(features)):
            archs.add(cpu.arch.__wrapped__())
    yield "CPU features", len(archs) == len(cpu._X86_LEVELS)


if __name__ == "__main__":
    print(*keys())
