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

ROOT = Path(__file__).parent.parent
TEMPLATES = sorted(path.name for path in (ROOT / "templates").glob("*.j2"))
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


def test_sdist_has_templates_and_tests(dist):
    (path,) = dist.glob("neuronjit-*.tar.gz")
    with tarfile.open(path) as archive:
        names = {name.split("/", 1)[-1] for name in archive.getnames()}
    assert {f"templates/{name}" for name in TEMPLATES} <= names
    assert {"tests/conftest.py", "LICENSE", "README.md", "CHANGELOG.md"} <= names
    assert not [name for name in names if name.startswith((".venv", ".vendor", ".git/"))]


def test_installed_wheel_renders(wheel, tmp_path):
    site, elsewhere = tmp_path / "site", tmp_path / "elsewhere"
    elsewhere.mkdir()
    pip = ["-m", "pip", "install", "--disable-pip-version-check", "-q", "--no-index", "--no-deps"]
    run(*pip, "--target", str(site), str(wheel), cwd=elsewhere)
    used = run(
        "-c", RENDER, cwd=elsewhere, PYTHONPATH=str(site)
    )  # comes before any editable install
    assert Path(used).is_relative_to(site)


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
