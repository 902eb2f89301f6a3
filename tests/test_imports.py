"""What importing the library does (nothing), and which file may import which."""

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from neuronjit.kernels.spec import RENDERERS

PACKAGE = Path(__file__).parent.parent / "neuronjit"

# Top to bottom: what is on one line imports from the lines below it, never from above. A folder
# stands for all of its files; within it, and on a line, imports only must not go in a circle.
FLOORS = """
neuronjit cli compat
integrations nn neuron_kernel export explanation plotting
run
kernels
cache neurons zoo surrogates models
language
errors settings terminal torch_private immutable
"""
RANK = {
    name: rank
    for rank, line in enumerate(reversed(FLOORS.split("\n")[1:-1]))
    for name in line.split()
}


def modules():
    """Dotted name inside the package ("" is its __init__) -> parsed file."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        parts = parts[:-1] if parts[-1] == "__init__" else parts
        found[".".join(parts)] = ast.parse(path.read_text("utf-8"), str(path))
    return found


MODULES = modules()


def resolve(name):
    """The module that `neuronjit.name` lives in: itself, or the module that defines it."""
    while name and name not in MODULES:
        name = name.rpartition(".")[0]
    return name


def imports(module, tree):
    """(module of this package, line) for every import, wherever it stands."""
    is_package = any(other.startswith(f"{module}.") for other in MODULES) or not module
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                root, _, rest = alias.name.partition(".")
                if root == "neuronjit":
                    yield resolve(rest), node.lineno
        elif isinstance(node, ast.ImportFrom):
            if node.level:
                parts = module.split(".") if module else []
                climb = node.level - is_package
                base = ".".join(parts[: len(parts) - climb] if climb else parts)
            elif node.module and node.module.split(".")[0] == "neuronjit":
                base = ""
            else:
                continue
            named = (node.module or "").removeprefix("neuronjit").strip(".")
            base = ".".join(filter(None, [base, named]))
            for alias in node.names:
                yield resolve(".".join(filter(None, [base, alias.name]))), node.lineno


GRAPH = {module: sorted(set(imports(module, tree))) for module, tree in MODULES.items()}


def test_the_graph_is_seen():
    """Guards the tests below against a parser of imports that finds none."""
    assert "errors" in {target for target, _ in GRAPH["language.parse"]}


def test_imports_have_no_cycle():
    done, path = set(), []

    def visit(module):
        if module in path:
            cycle = [*path[path.index(module) :], module]
            pytest.fail("import cycle: " + " -> ".join(name or "__init__" for name in cycle))
        if module not in done:
            path.append(module)
            for target in {target for target, _ in GRAPH[module]}:
                visit(target)
            done.add(path.pop())

    for module in GRAPH:
        visit(module)


def test_imports_point_down():
    wrong = []
    for module, targets in GRAPH.items():
        unit = module.split(".")[0] or "neuronjit"
        if unit not in RANK:
            wrong.append(f"neuronjit/{unit} is on no floor (FLOORS in tests/test_imports.py)")
            continue
        for target, line in targets:
            other = target.split(".")[0] or "neuronjit"
            if RANK.get(other, 9) > RANK[unit]:
                wrong.append(f"neuronjit/{module or '__init__'}:{line} imports {other}")
    assert not wrong, "\n".join(wrong)


# data that is in a spec itself, or what decides no text
NO_TEXT = {"errors", "immutable", "neurons", "settings", "surrogates"}


def test_all_that_renders_is_in_the_digest():
    """What makes a cached kernel stale is the code of whole folders: those of all that renders."""
    seen, todo = set(), ["kernels.render"]
    while todo:
        module = todo.pop()
        if module not in seen and module.split(".")[0] not in NO_TEXT:
            seen.add(module)
            todo += [target for target, _ in GRAPH[module]]
    assert {module.split(".")[0] for module in seen} == set(RENDERERS)


BANNED_MODULES = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"}
BANNED_CALLS = {"eval", "exec", "__import__"}
BANNED_ATTRIBUTES = {("os", "system"), ("os", "popen"), ("torch", "load")}


def test_no_code_from_data_and_no_shell():
    """No unpickling, no eval, no shell: what is read from disk never becomes code unverified."""
    wrong = []
    for module, tree in MODULES.items():
        for node in ast.walk(tree):
            match node:
                case ast.Import(names=names):
                    bad = {alias.name.split(".")[0] for alias in names} & BANNED_MODULES
                case ast.ImportFrom(module=str(name), level=0):
                    bad = {name.split(".")[0]} & BANNED_MODULES
                case ast.Name(id=name):
                    bad = {name} & BANNED_CALLS
                case ast.Attribute(value=ast.Name(id="builtins"), attr=name):
                    bad = {name} & BANNED_CALLS
                case ast.Attribute(value=ast.Name(id=owner), attr=name):
                    bad = {(owner, name)} & BANNED_ATTRIBUTES
                case ast.keyword(arg="shell", value=value):
                    harmless = isinstance(value, ast.Constant) and value.value is False
                    bad = set() if harmless else {"shell="}
                case _:
                    bad = set()
            where = f"neuronjit/{module or '__init__'}:{getattr(node, 'lineno', '?')}"
            wrong += [f"{where}: {name}" for name in bad]
    assert not wrong, "\n".join(wrong)


def imported(what, cwd, **environment):
    """Top-level modules in memory after `import what` in a new process."""
    code = f"import sys, json, {what}; print(json.dumps([n.split('.')[0] for n in sys.modules]))"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=cwd, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return set(json.loads(done.stdout.splitlines()[-1]))


def test_import_does_nothing(tmp_path):
    """Importing neuronjit imports torch, itself and the standard library, and touches no file."""
    places = {}
    for name in ("HOME", "XDG_CACHE_HOME", "XDG_CONFIG_HOME", "XDG_RUNTIME_DIR", "TMPDIR", "cwd"):
        places[name] = tmp_path / name.lower()
        places[name].mkdir()
    cwd = places.pop("cwd")
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("NEURONJIT", "XDG"))}
    environment |= {name: str(place) for name, place in places.items()}
    environment |= {"PYTHONDONTWRITEBYTECODE": "1"}
    before = [str(PACKAGE.parent), os.environ.get("PYTHONPATH", "")]
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, before))
    torch_alone = imported("torch", cwd, **environment)
    ours = imported("neuronjit", cwd, **environment)
    left = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")}
    assert left == {"cwd", *(place.name for place in places.values())}
    assert ours - torch_alone - set(sys.stdlib_module_names) == {"neuronjit"}
