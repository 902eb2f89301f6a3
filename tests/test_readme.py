"""The README's Python runs as it stands."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from neuronjit.integrations import norse, snntorch, spikingjelly

README = Path(__file__).parent.parent / "README.md"
BLOCKS = re.findall(r"^```python\n(.*?)^```", README.read_text("utf-8"), re.M | re.S)


def test_readme_has_examples():
    assert BLOCKS


@pytest.mark.parametrize("block", BLOCKS, ids=range(len(BLOCKS)))
def test_readme_example_runs(block, tmp_path):
    path = os.pathsep.join(filter(None, [str(README.parent), os.environ.get("PYTHONPATH")]))
    done = subprocess.run(
        [sys.executable, "-c", block],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("page", ["docs/integrations.md", "tests/README.md"])
@pytest.mark.parametrize("library", [spikingjelly, snntorch, norse], ids=lambda m: m.PACKAGE)
def test_tables_have_every_neuron_of_other_libraries(library, page):
    text = (README.parent / page).read_text("utf-8")
    layers = [name for name in library.NODES if not name.endswith("Cell")]
    alone = [name for name in library.NODES if name.removesuffix("Cell") not in library.NODES]
    assert not [name for name in (*layers, *alone) if f"`{name}`" not in text]
