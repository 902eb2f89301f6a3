"""The wheel and the editable install work from anywhere, templates included."""

import json
import os
import subprocess
import sys
import tarfile
import textwrap
import zipfile
from importlib import metadata
from pathlib import Path

import pytest

pytestmark = pytest.mark.xdist_group("packaging")  # one worker builds, for all of them
ROOT = Path(__file__).parent.parent
TEMPLATES = sorted(path.name for path in (ROOT / "templates").iterdir())
TYPED = textwrap.dedent(
    """
    import neuronjit as nj

    out = nj.multistep(nj.neurons.LIF, nj.nn.LIF(tau=2.0, surrogate=nj.surrogates.ATan(3.0)).v)
    reveal_type(out)
    nj.NeuronModel(3, "h = v + x", state={"v": 0.0})
    nj.nn.LIFNode(detach_reset="no")
    nj.nn.LIF(detach_reset="no")
    """
)
RENDER = textwrap.dedent(
    """
    import neuronjit

    source = neuronjit.render(neuronjit.neurons.LIF, target="cuda")
    assert "__global__" in source, source
    print(neuronjit.__file__)
    """
)


def run(*command, cwd, **environment):
    done = subprocess.run(
        [sys.executable, *command],
        cwd=cwd,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
    )
    assert done.returncode == 0, f"{command}:\n{done.stdout}\n{done.stderr}"
    return done.stdout.strip()


@pytest.fixture(scope="module")
def dist(tmp_path_factory):
    """A folder with the sdist, and the wheel built from that sdist: as a release is made."""
    for tool in ("build", "hatchling"):
        pytest.importorskip(tool, reason=f"needs {tool}: pip install -e '.[test]'")
    folder = tmp_path_factory.mktemp("dist")
    run("-m", "build", "--no-isolation", "--outdir", str(folder), str(ROOT), cwd=folder)
    return folder


@pytest.fixture(scope="module")
def wheel(dist):
    (path,) = dist.glob("neuronjit-*.whl")
    return path


def test_wheel_has_the_templates_and_nothing_beside_the_package(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    inside = [Path(name).name for name in names if name.startswith("neuronjit/templates/")]
    assert sorted(inside) == TEMPLATES
    info = next(name.split("/")[0] for name in names if ".dist-info/" in name)
    assert {name.split("/")[0] for name in names} == {"neuronjit", info}
    assert f"{info}/licenses/LICENSE" in names
    assert "neuronjit/py.typed" in names


def test_sdist_has_templates_and_tests(dist):
    (path,) = dist.glob("neuronjit-*.tar.gz")
    with tarfile.open(path) as archive:
        names = {name.split("/", 1)[-1] for name in archive.getnames()}
    assert {f"templates/{name}" for name in TEMPLATES} <= names
    assert {"tests/conftest.py", "LICENSE", "README.md", "CHANGELOG.md"} <= names
    assert "neuronjit/py.typed" in names
    assert not [name for name in names if name.startswith((".venv", ".vendor", ".git/"))]


@pytest.fixture(scope="module")
def site(wheel, tmp_path_factory):
    """Where the wheel is installed; on PYTHONPATH it comes before any editable install."""
    folder = tmp_path_factory.mktemp("site")
    pip = ["-m", "pip", "install", "--disable-pip-version-check", "-q", "--no-index", "--no-deps"]
    run(*pip, "--target", str(folder), str(wheel), cwd=folder)
    return folder


def test_installed_wheel_renders(site, tmp_path):
    used = run("-c", RENDER, cwd=tmp_path, PYTHONPATH=str(site))
    assert Path(used).is_relative_to(site)


def test_a_users_mypy_sees_the_types(site, tmp_path):
    """Without py.typed it would say import-untyped, and all else would be Any."""
    pytest.importorskip("mypy", reason="needs mypy: pip install -e '.[test]'")
    (tmp_path / "user.py").write_text(TYPED)
    (tmp_path / "mypy.ini").write_text("[mypy]\n[mypy-torch.*]\nfollow_imports = skip\n")  # slow
    done = subprocess.run(
        [sys.executable, "-m", "mypy", "--no-incremental", "user.py"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(site)},
        capture_output=True,
        text=True,
    )
    said = done.stdout.replace("user.py:", "").splitlines()
    assert "Revealed type is " in said[0] and "Output" in said[0]
    wrong = [line.partition(":")[0] for line in said if "[arg-type]" in line]
    assert wrong == ["6", "7", "8"] and len(said) == 5, done.stdout + done.stderr


def _editable():
    try:
        text = metadata.distribution("neuronjit").read_text("direct_url.json")
    except metadata.PackageNotFoundError:
        return False
    return json.loads(text or "{}").get("dir_info", {}).get("editable", False)


@pytest.mark.skipif(not _editable(), reason="neuronjit is not installed in editable mode here")
def test_editable_install_renders(tmp_path):
    used = run("-c", RENDER, cwd=tmp_path, PYTHONPATH="")
    assert Path(used).is_relative_to(ROOT)
