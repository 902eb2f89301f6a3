"""What every test may rely on: a cache of the session's own, and skips that say why."""

import gc
import importlib.util
import os
import shutil
import tempfile

import pytest

PEERS = ("spikingjelly", "snntorch")


def pytest_configure(config):
    """Give the session a cache directory of its own.

    Set here and not in a fixture: so it holds while tests are collected too, for the processes that
    tests start, and for xdist's workers, who compile each kernel once between them.
    """
    if hasattr(config, "workerinput"):
        return
    for switch in [name for name in os.environ if name.startswith("NEURONJIT_")]:
        if switch != "NEURONJIT_FRONT_END":  # each test is to pass with either
            del os.environ[switch]  # the developer's own settings decide no test
    config._neuronjit_cache = tempfile.mkdtemp(prefix="neuronjit-tests-")
    os.environ["NEURONJIT_CACHE_DIR"] = config._neuronjit_cache
    # Several workers on few cores: threads that wait for the next kernel must not spin.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def pytest_unconfigure(config):
    if directory := getattr(config, "_neuronjit_cache", None):
        shutil.rmtree(directory, ignore_errors=True)


def pytest_collection_finish():
    """What all tests share is not looked through again by each collection of garbage."""
    gc.collect()
    gc.freeze()


def _no_cuda():
    """Why tests marked `cuda` cannot run here, or None."""
    import torch

    if not torch.cuda.is_available():
        return f"needs a CUDA GPU: torch {torch.__version__} finds none"
    if importlib.util.find_spec("cupy") is None:
        return "needs CuPy: pip install -e '.[cuda12]'"
    return None


def _no_nvrtc():
    """Why tests marked `nvrtc` cannot run here, or None."""
    from neuronjit.kernels.targets import cuda

    why = cuda.why_unavailable() or ""
    return why if "NVRTC" in why else None


def pytest_collection_modifyitems(items):
    for marker, why in (("cuda", _no_cuda), ("nvrtc", _no_nvrtc)):
        marked = [item for item in items if item.get_closest_marker(marker)]
        if marked and (reason := why()):
            for item in marked:
                item.add_marker(pytest.mark.skip(reason=reason))
    for item in items:
        if item.get_closest_marker("memory") and "PYTEST_XDIST_WORKER" in os.environ:
            item.add_marker(pytest.mark.skip(reason="run apart, without -n: pytest -m memory"))
        if marker := item.get_closest_marker("peers"):
            names = marker.args or PEERS
            if missing := [name for name in names if importlib.util.find_spec(name) is None]:
                reason = f"needs {' and '.join(missing)} on the Python path"
                item.add_marker(pytest.mark.skip(reason=reason))
