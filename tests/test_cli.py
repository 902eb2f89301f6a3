"""neuronjit-cache: what each command prints, returns and leaves behind."""

import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import warnings
from dataclasses import replace
from pathlib import Path

import pytest

from neuronjit import cli, settings
from neuronjit.cache import admin, folders, store

COMMANDS = [
    "path",
    "info",
    "list",
    "show",
    "stats",
    "prebuild",
    "verify",
    "clear",
    "export",
    "import",
]
BUILD = [
    "prebuild",
    "--neuron",
    "if",
    "--surrogate",
    "atan",
    "--target",
    "cpu",
    "--dtype",
    "float64",
]


@pytest.fixture(scope="module")
def filled(tmp_path_factory):
    """A directory with the kernels of BUILD."""
    place = tmp_path_factory.mktemp("filled") / "cache"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NEURONJIT_CACHE_DIR", str(place))
        assert cli.main(BUILD) == 0
    return place


@pytest.fixture
def kernels(filled, tmp_path, monkeypatch):
    """The same, to do with as one likes."""
    place = tmp_path / "cache"
    shutil.copytree(filled, place)
    monkeypatch.setenv("NEURONJIT_CACHE_DIR", str(place))
    return place


@pytest.fixture
def empty(tmp_path, monkeypatch):
    monkeypatch.setenv("NEURONJIT_CACHE_DIR", str(tmp_path / "empty"))
    return tmp_path / "empty"


@pytest.fixture
def run(capsys):
    """Runs a command: (exit code, stdout, stderr)."""

    def call(*words):
        capsys.readouterr()
        code = cli.main([str(word) for word in words])
        return code, *capsys.readouterr()

    return call


def hostile_entry():
    """A kernel whose metadata would turn the terminal red, and set its title."""
    meta = {"request": "0" * 64, "fingerprint": {}, "target": "cpu", "arch": "[bold]x[/bold]"}
    meta |= {"symbol": "\x1b[31mred\x1b]0;title\x07\x9b1m\u202etxt\n", "model": "a\rb"}
    key = store.make_key(meta["request"], {})
    return store.load_or_make(key, lambda: store.Entry(key, meta, "int x; // \x1b[2J\n", b"\0"))


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_examples(run, command):
    code, out, _ = run(command, "--help")
    assert code == 0
    assert f"examples:\n  neuronjit-cache {command}" in out
    assert "--json" in out


@pytest.mark.parametrize(
    "words",
    [
        "",
        "nope",
        "show",
        "clear --older-than soon",
        "prebuild",
        "prebuild --learn tau",
        "prebuild --neuron lyf",
        "prebuild --neuron lif --surrogate atom",
        "prebuild --neuron lif --arch sm_x",
        "prebuild --neuron lif --arch z80",
        "prebuild --neuron lif --target cpu --arch sm_90",
        "prebuild --neuron lif --learn tao",
        "prebuild --neuron lif --record w",
        "prebuild --neuron lif --dtype int8",
    ],
)
def test_usage_errors_are_2_and_build_nothing(run, empty, words):
    code, out, err = run(*words.split())
    assert (code, out) == (2, "")
    assert "neuronjit-cache" in err
    assert not empty.exists()


def test_path(run, kernels, monkeypatch):
    monkeypatch.setenv("NEURONJIT_CACHE_PATH", "/opt/a:/opt/b")
    assert run("path") == (0, f"{kernels}\n", "")
    found = json.loads(run("path", "--json")[1])
    assert found == {"user": str(kernels), "search": [str(kernels), "/opt/a", "/opt/b"]}


def test_info_says_whether_and_why_a_directory_is_trusted(run, kernels, tmp_path, monkeypatch):
    site = tmp_path / "site"
    site.mkdir()
    site.chmod(0o777)
    monkeypatch.setenv("NEURONJIT_CACHE_PATH", str(site))
    code, out, _ = run("info")
    assert code == 0
    for expected in ("cpu compiler", "torch", f"NEURONJIT_CACHE_PATH\t{site}", "can be written by"):
        assert expected in out
    found = {d["path"]: d for d in json.loads(run("info", "--json")[1])["directories"]}
    assert found[str(kernels)]["trusted"]
    assert not found[str(site)]["trusted"]


def test_list(run, kernels):
    code, out, _ = run("list")
    lines = [line.split("\t") for line in out.splitlines()]
    assert code == 0
    assert len(lines) == 1 + len(list(kernels.iterdir()))
    assert {line[2] for line in lines[1:]} == {"cpu"}
    assert any(line[1].startswith("if_backward_float64_hard_ATan") for line in lines)
    found = json.loads(run("list", "--json")[1])
    assert {entry["key"] for entry in found} == {path.name for path in kernels.iterdir()}


@pytest.mark.parametrize("terminal", [False, True])
def test_names_move_no_cursor(run, empty, monkeypatch, terminal):
    entry = hostile_entry()
    monkeypatch.setenv("COLUMNS", "250")
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: terminal)
    for words in (["list"], ["show", entry.key], ["stats"]):
        code, out, err = run(*words)
        assert code == 0
        words = re.sub(r"\x1b\[[01]m", "", out + err)  # rich's own: headings are bold
        assert all(c.isprintable() or c in "\n\t" for c in words), ascii(words)
    assert r"\x1b[31mred" in run("list")[1]
    assert "[bold]x[/bold]" in run("list")[1]


def test_show(run, kernels):
    key = min(path.name for path in kernels.iterdir())
    code, out, _ = run("show", key[:20])
    assert code == 0
    assert f"key\t{key}" in out
    assert "struct" in out
    found = json.loads(run("show", key, "--json")[1])
    assert found["meta"]["symbol"] in found["source"]
    assert run("show", "")[::2] == (1, run("show", "")[2])
    assert "several kernels" in run("show", "")[2]
    assert "no kernel" in run("show", "xyz")[2]


def test_stats(run, kernels):
    found = json.loads(run("stats", "--json")[1])
    assert found["kernels"] == len(list(kernels.iterdir()))
    assert found["bytes"] == sum(path.stat().st_size for path in kernels.iterdir())
    assert found["models"] == {"if": found["kernels"]}
    assert f"kernels\t{found['kernels']}" in run("stats")[1]


def test_prebuild_compiles_once(run, kernels):
    built = len(list(kernels.iterdir()))
    code, out, _ = run(*BUILD, "--json")
    found = json.loads(out)
    assert code == 0
    assert (found["compiled"], found["loaded"], found["failed"], found["lost"]) == (0, built, 0, 0)
    assert found["bytes"] == sum(path.stat().st_size for path in kernels.iterdir())
    assert f"{built} were there" in run(*BUILD)[1]


def test_prebuild_says_what_failed(run, empty, tmp_path, monkeypatch):
    broken = tmp_path / "c++"
    broken.write_text(
        "#!/bin/sh\n[ $1 = --version ] && echo broken && exit\necho no luck >&2; exit 1\n"
    )
    broken.chmod(0o755)
    monkeypatch.setenv("CXX", str(broken))
    code, out, err = run(*BUILD)
    assert code == 1
    assert "0 kernels compiled" in out
    assert "if_forward_float64" in err
    assert "no luck" in err
    monkeypatch.setenv("CXX", "not-there")
    code, out, err = run(*BUILD)
    assert (code, out) == (1, "")
    assert err.count("not-there") == 1
    assert not list(empty.iterdir())


def test_prebuild_says_what_could_not_be_kept(run, empty, monkeypatch):
    monkeypatch.setenv("NEURONJIT_CACHE_SIZE", "0")
    monkeypatch.setattr(store, "_memory", {})
    code, _, err = run(*BUILD, "--reset", "soft")
    assert code == 1
    assert "could not be kept" in err


def test_verify(run, kernels):
    code, out, _ = run("verify")
    assert (code, out.split()[0]) == (0, str(len(list(kernels.iterdir()))))
    victim = next(kernels.iterdir())
    data = bytearray(victim.read_bytes())
    data[len(data) // 2] ^= 1
    victim.write_bytes(data)
    code, out, _ = run("verify")
    assert code == 1
    assert victim.name in out
    assert victim.exists()
    assert "cannot be used" in run("show", victim.name)[2]
    code, out, _ = run("verify", "--fix", "--json")
    assert code == 1
    assert [f["key"] for f in json.loads(out)["findings"] if f["removed"]] == [victim.name]
    assert not victim.exists()
    assert run("verify")[0] == 0


@pytest.mark.parametrize("answer", ["n\n", "", "y\n"])
def test_clear_asks_before_it_deletes_everything(run, kernels, monkeypatch, answer):
    before = list(kernels.iterdir())
    with open(kernels.parent / "answer", "w+") as stdin:
        stdin.write(answer)
        stdin.seek(0)
        monkeypatch.setattr(sys, "stdin", stdin)
        code, out, _ = run("clear")
    assert f"Delete all {len(before)} kernels" in out
    assert code == (0 if answer == "y\n" else 1)
    assert len(list(kernels.iterdir())) == (0 if answer == "y\n" else len(before))


def test_clear_chooses(run, kernels):
    old, *others = sorted(kernels.iterdir())
    os.utime(old, times=(time.time() - 40 * 86400,) * 2)
    assert json.loads(run("clear", "--neuron", "lif", "--json")[1])["kernels"] == 0
    assert json.loads(run("clear", "--stale-only", "--json")[1])["kernels"] == 0
    assert (
        json.loads(run("clear", "--older-than", "30d", "--neuron", "if", "--json")[1])["kernels"]
        == 1
    )
    assert sorted(kernels.iterdir()) == others
    assert run("clear", "--yes")[0] == 0
    assert not list(kernels.iterdir())


def test_clear_stale_only(run, kernels, monkeypatch):
    monkeypatch.setattr("neuronjit.kernels.build.version", lambda: "9.9+0")
    assert json.loads(run("clear", "--stale-only", "--json")[1])["kernels"] > 0
    assert not list(kernels.iterdir())


def test_export_and_import(run, kernels, tmp_path, monkeypatch):
    bundle, site = tmp_path / "kernels.njc", tmp_path / "site"
    before = {path.name: path.read_bytes() for path in kernels.iterdir()}
    code, out, _ = run("export", bundle, "--json")
    exported = json.loads(out)
    assert (code, exported["kernels"]) == (0, len(before))
    code, _, err = run("import", bundle, "--to", site)
    assert code == 1
    assert exported["sha256"] in err
    assert run("import", bundle, "--to", site, "--sha256", "0" * 64)[0] == 1
    assert not site.exists()
    assert run("import", bundle, "--to", site, "--sha256", exported["sha256"])[0] == 0
    assert {path.name: path.read_bytes() for path in site.iterdir()} == before
    assert "0 kernels" in run("import", bundle, "--to", site, "--trust")[1]
    monkeypatch.setenv("NEURONJIT_CACHE_DIR", str(tmp_path / "mine"))
    assert run("import", bundle, "--trust")[0] == 0
    assert run("export", tmp_path / "one.njc", min(before)[:16])[0] == 0
    assert run("import", tmp_path / "not-there", "--trust")[0] == 1
    assert run("import", __file__, "--trust")[0] == 1


def test_export_of_nothing_is_told(run, empty, tmp_path):
    assert run("export", tmp_path / "kernels.njc")[0] == 1


def start(*words, **environment):
    environment = {**os.environ, "PYTHONPATH": str(Path(cli.__file__).parent.parent), **environment}
    return subprocess.Popen(
        [sys.executable, "-m", "neuronjit.cli", *map(str, words)],
        env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        start_new_session=True,
        # a job in the background ignores Ctrl-C, and so would what it starts
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )  # fmt: skip


@pytest.mark.slow
def test_interrupted_prebuild_leaves_a_sound_cache(empty, run):
    """Ctrl-C reaches the compilers too: what they had not finished is not published."""
    process = start(*BUILD, "--reset", "hard", "soft", "--jobs", "1")
    until = time.monotonic() + 120
    while not (empty.is_dir() and list(empty.iterdir())) and time.monotonic() < until:
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGINT)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 130, err
    assert "what was finished is kept" in err
    assert "Traceback" not in err
    assert run("verify")[0] == 0
    assert list(admin.entries())
    assert all(len(path.name) == 64 for path in empty.iterdir())


def test_a_closed_pipe_is_no_traceback(kernels):
    process = start("show", min(path.name for path in kernels.iterdir()))
    process.stdout.close()
    err = process.stderr.read()
    assert process.wait(timeout=60) == 1
    assert err == ""


@pytest.mark.parametrize("stream", ["stdin", "stdout", "stderr"])
@pytest.mark.parametrize("words", ["list", "clear", "show nothing"])
def test_a_stream_that_was_closed_is_no_traceback(
    run, kernels, tmp_path, monkeypatch, stream, words
):
    monkeypatch.setattr(sys, "stdin", io.StringIO())
    monkeypatch.setattr(sys, stream, None)
    before = set(kernels.iterdir())
    assert cli.main(words.split()) == (0 if words == "list" else 1)
    assert set(kernels.iterdir()) == before


def test_absurd_times_are_listed(run, kernels, monkeypatch):
    real = admin._listed

    def odd(folder, key):
        for number, listed in enumerate(real(folder, key)):
            times = (-1.0, -(2.0**62), 2.0**40, 2.0**62, 1e300)
            yield replace(listed, used=times[(int(key, 16) + number) % len(times)])

    monkeypatch.setattr(admin, "_listed", odd)
    code, out, _ = run("list")
    assert code == 0 and len(out.splitlines()) == 1 + len(list(kernels.iterdir()))
    assert run("list", "--json")[0] == 0


def test_warnings_that_are_errors_are_said_and_not_raised(run, kernels, monkeypatch):
    monkeypatch.setenv("NEURONJIT_CACHE_SIZE", "many")
    monkeypatch.setattr(settings, "_warned", {})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        code, out, err = run("stats")
    assert code == 0 and "kernels" in out and "warning: NEURONJIT_CACHE_SIZE='many'" in err


def test_export_refuses_what_is_no_file(run, kernels, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    code, _, err = run("export", tmp_path / "pipe")
    assert code == 1 and "no regular file" in err and (tmp_path / "pipe").is_fifo()


def test_import_says_what_the_size_of_the_cache_makes_of_it(run, kernels, tmp_path, monkeypatch):
    bundle = tmp_path / "kernels.njc"
    assert run("export", bundle)[0] == 0
    monkeypatch.setattr(settings, "_warned", {})
    monkeypatch.setenv("NEURONJIT_CACHE_DIR", str(tmp_path / "mine"))
    monkeypatch.setenv("NEURONJIT_CACHE_SIZE", "0")
    code, _, err = run("import", bundle, "--trust")
    assert code == 1 and "NEURONJIT_CACHE_SIZE=0" in err and not (tmp_path / "mine").exists()
    monkeypatch.setenv("NEURONJIT_CACHE_SIZE", "1K")
    code, out, err = run("import", bundle, "--trust")
    assert code == 0 and "allows 1024" in err and "kernels into" in out
    assert len(list((tmp_path / "mine").iterdir())) == len(list(kernels.iterdir()))


def test_info_says_what_is_trusted_though_ssh_would_not(run, kernels, monkeypatch):
    monkeypatch.setattr(folders, "_is_private", lambda st, fd: True)
    kernels.chmod(0o775)
    code, out, _ = run("info")
    assert code == 0 and f"yes; the group that can write '{kernels}' is this user's alone" in out
    directories = json.loads(run("info", "--json")[1])["directories"]
    assert [d["lenient"] != [] for d in directories if d["path"] == str(kernels)] == [True]


@pytest.mark.parametrize("words", ["export", "import", "import file --to", "prebuild --manifest"])
def test_names_that_no_file_has(run, kernels, words):
    code, _, err = run(*words.split(), "a\0b")
    assert code == 2 and "is no file's name" in err
