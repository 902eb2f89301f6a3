"""Compilers that fail, lie, hang or are watched by others: no wrong result, no crash, no trace."""

import contextlib
import itertools
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import cachekit
import oracle
import pytest
import torch
from cachekit import ALICE, MALLORY, Child, needs_linux, needs_root, patched
from promises_places import _limit, _mount
from support import assert_same_bits, inputs, slow

import neuronjit as nj
from neuronjit.cache import admin, entries, store
from neuronjit.kernels import ahead, build, targets
from neuronjit.kernels.render import render_specs
from neuronjit.kernels.spec import KernelSpec
from neuronjit.kernels.targets import base as common
from neuronjit.kernels.targets import cpu, cuda, scratch

pytestmark = [
    needs_linux,
    pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++"),
]
ROOT = Path(nj.__file__).parent.parent
REAL = shutil.which("g++")
X = inputs((5, 7))
SPEC = replace(  # what a call with X looks up
    KernelSpec.of("if", "cpu", "forward", "atan", "hard", False, "float32"),
    **cpu.shape("forward", 4, nj.neurons.IF, 0, 7, 5, True)._asdict(),
)


@pytest.fixture
def base(monkeypatch):
    """A folder that other users can look into, with a cache; this process has forgotten all."""
    with cachekit.for_all_users() as path:
        place = path / "cache"
        place.mkdir(mode=0o700)
        monkeypatch.setenv("NEURONJIT_CACHE_DIR", str(place))
        monkeypatch.setenv("NEURONJIT_CACHE_PATH", "")
        monkeypatch.delenv("TMPDIR", raising=False)
        monkeypatch.setattr(build, "_kernels", {})
        cachekit.forget()
        yield path
    cachekit.forget()


def compiler(folder, script, version="echo test 1.0"):
    """A compiler that answers --version so; $out is what it is to write, `real` writes it."""
    path = Path(folder, f"cxx-{len(os.listdir(folder))}")
    path.write_text(
        "#!/bin/bash\n"
        f'if [ "$1" = --version ]; then {version}; fi\n'
        'if [ "$1" = --version ]; then exit; fi\n'
        'for a in "$@"; do [ "$last" = -o ] && out="$a"; last="$a"; done\n'
        f'real() {{ {REAL} "$@"; }}\n'
        'made() { [ -e "$0.so" ] || { real "$@"; cp "$out" "$0.so"; }; cp "$0.so" "$out"; }\n'
        f"{script}\n"
    )
    path.chmod(0o755)
    return str(path)


EXPECTED = oracle.run("IF", X, surrogate=oracle.Surrogate("ATan")).spikes


def right(**options):
    assert_same_bits(nj.multistep(nj.neurons.IF, X, **options).spikes, EXPECTED, "s")
    return True


def outcome():
    """What the engine gives in a process of its own: "kernel", or the library's error."""
    build._kernels.clear()
    cachekit.forget()
    try:
        build.load_kernel(SPEC)
    except nj.NeuronJitError as error:
        name = type(error).__name__
        with pytest.raises(type(error)):  # what is forced says why
            nj.multistep(nj.neurons.IF, X, backend="cpu")
        assert right()  # in auto mode: eager
        return name
    return "kernel" if right(backend="cpu") else "wrong"


BROKEN = {  # compilers that say that all went well
    "writes half": 'made "$@"; truncate -s 8000 "$out"',
    "one byte too few": 'made "$@"; truncate -s -1 "$out"',
    "zeros for the second half": 'made "$@"; truncate -s 8000 "$out"; truncate -s 15896 "$out"',
    "an object file": 'real -c "$@"',
    "omits the symbol": 'echo "int x;" >"$out.cpp"; real -shared -fPIC "$out.cpp" -o "$out"',
    "an executable": 'echo "int main() {}" >"$out.cpp"; real "$out.cpp" -o "$out"',
    "a text": 'echo kernel >"$out"',
    "an empty file": ': >"$out"',
    "nothing": "exit 0",
    "a folder": 'mkdir "$out"',
    "a pipe": 'mkfifo "$out"',
    "a link to itself": 'ln -s "$out" "$out"',
    "a device": 'ln -s /dev/zero "$out"',
}


@pytest.mark.parametrize("name", BROKEN)
def test_p17_nothing_broken_is_published(base, monkeypatch, name):
    """The first process and later ones get an error, and no signal ends them."""
    monkeypatch.setenv("CXX", compiler(base, BROKEN[name]))
    for _ in range(11 if name == "writes half" else 2):
        assert Child(outcome).result() == "CompileError"
    assert cachekit.kernel_files(base / "cache") == []
    monkeypatch.setenv("CXX", REAL)
    assert Child(outcome).result() == "kernel"


def damaged(binary, way):
    """What compilers that were stopped leave, sealed by a sound checksum."""
    ways = {
        "half": binary[: len(binary) // 2],
        "empty": b"",
        "other symbol": binary.replace(SPEC.symbol.encode(), SPEC.symbol[:-1].encode() + b"X"),
        "other machine": binary[:18] + b"\xb7" + binary[19:],
        "needs a library that is gone": binary.replace(b"libc.so.6", b"libz.gone"),
    }
    return ways[way]


WAYS = ["half", "empty", "other symbol", "other machine", "needs a library that is gone"]


@pytest.mark.parametrize("way", WAYS)
def test_p17_a_whole_entry_that_does_not_load_is_rebuilt_once(base, way):
    entry = build.entry(SPEC, cpu.arch())
    broken = damaged(entry.binary, way)
    assert broken != entry.binary
    path = base / "cache" / entry.key
    path.unlink()
    cachekit.forget()
    planted = store.Entry(entry.key, entry.meta, entry.source, broken)
    store.load_or_make(entry.key, lambda: planted)
    found = [finding.key for finding in admin.verify(build.why_no_kernel)[1]]
    assert found == ([] if "gone" in way else [entry.key])  # who verifies may be another machine
    first, second = Child(outcome).finish(), Child(outcome).finish()
    assert first["value"] == second["value"] == "kernel"
    assert len(first["warnings"]) == 1 and second["warnings"] == []
    assert admin.verify(build.why_no_kernel)[1] == [] and admin.stats()["rebuilt"] == {"damaged": 1}


PTX = "sm_130"  # newer than NVRTC
CUDA_ARCHS = ("sm_90", "sm_90a", "sm_100a", PTX)


@pytest.mark.parametrize(
    "arch", ["cpu", *(pytest.param(arch, marks=pytest.mark.nvrtc) for arch in CUDA_ARCHS)]
)
def test_p17_what_is_cut_short_or_for_another_machine_is_no_kernel(base, arch):
    """Every prefix; and changed bytes, of headers above all, are no exception."""
    generator = random.Random(0)
    if arch == "cpu":
        target, spec, arch, other = cpu, SPEC, cpu.arch(), "aarch64"
        binary = build.entry(spec, arch).binary
    else:
        spec = KernelSpec.of("if", "cuda", "forward", "atan", "hard", False, "float32")
        target, other = cuda, "sm_80"
        binary = cuda.compile(render_specs([spec]), spec.symbol, arch)
    assert target.check(binary, spec.symbol, arch) == ""
    assert arch == PTX or target.check(binary, spec.symbol, other)
    assert target.check(binary, "another", arch)
    assert all(target.check(binary[:size], spec.symbol, arch) for size in range(len(binary)))
    for _ in range(2000):
        changed = bytearray(binary)
        at = generator.randrange(64 if generator.random() < 0.3 else len(binary))
        changed[at] ^= 1 << generator.randrange(8)
        assert isinstance(target.check(bytes(changed), spec.symbol, arch), str)


def test_p17_no_prefix_ends_the_process_that_loads_it(base):
    binary = build.entry(SPEC, cpu.arch()).binary

    def load_all():
        refused = 0
        for size in range(0, len(binary), 512):
            with pytest.raises(nj.BackendError):
                cpu.load(binary[:size], SPEC.symbol, 64)
            refused += 1
        return refused

    assert Child(load_all).result() == len(range(0, len(binary), 512))


# --- P18 ------------------------------------------------------------------------------------------


def planted(base):
    """A shared object that tells when its code runs."""
    ran, text, binary = base / "ran", base / "planted.cpp", base / "planted.so"
    text.write_text(
        "#include <fcntl.h>\n"
        f'__attribute__((constructor)) static void run() {{ creat("{ran}", 0666); }}\n'
        f'extern "C" void {SPEC.symbol}(const void*, int) {{}}\n'
    )
    subprocess.run([REAL, "-shared", "-fPIC", text, "-o", binary], check=True)
    binary.chmod(0o644)
    base.chmod(0o777 | 0o1000)  # so that the planted code can write there
    return ran, binary


def attack(place, binary):
    """Everything that appears in a folder that all can write is replaced, again and again."""
    assembly = f'.section .init_array,"aw"\n.globl {SPEC.symbol}\n{SPEC.symbol}:\n ret\n'
    for number in itertools.count():
        for name in os.listdir(place):
            with contextlib.suppress(OSError):
                path = Path(place, name)
                if name.endswith(".so"):
                    os.replace(shutil.copy(binary, f"{place}/x{number}"), path)
                elif name.endswith(".s"):
                    Path(place, f"y{number}").write_text(assembly)
                    os.replace(f"{place}/y{number}", path)
                elif path.is_dir() and not name.startswith("taken"):
                    os.rename(path, Path(place, f"taken{number}"))
                    path.mkdir()
                    path.chmod(0o777)
                    shutil.copy(binary, path / "kernel.so")
                    shutil.copy(binary, path / f"{os.getpid()}-0.so")


def under_attack(base, work, rounds):
    """What Alice's work gives, her TMPDIR being a folder where Mallory is at work, each time."""
    ran, binary = planted(base)
    place = base / "scratch"
    place.mkdir()
    place.chmod(0o777)
    os.chown(base / "cache", ALICE, ALICE)
    mallory = Child(attack, place, binary, uid=MALLORY)
    found = []
    try:
        for _ in range(rounds):

            def setup():
                os.environ["TMPDIR"] = str(place)

            found.append(Child(work, uid=ALICE, setup=setup).finish())
            for path in (base / "cache").iterdir():
                assert b"creat" not in entries.decode(path.read_bytes(), path.name).binary
                path.unlink()
    finally:
        mallory.kill()
        mallory.wait_status()
    assert not ran.exists()
    for each in found:
        assert len(each["warnings"]) == 1, each["warnings"]
        assert all(word in each["warnings"][0] for word in (str(place), "owner", "mode 0777"))
    return [each["value"] for each in found]


each_length = pytest.mark.parametrize("rounds", [3, slow(20)])


@needs_root
@each_length
def test_p18_where_others_can_write_nothing_is_compiled(base, rounds):
    assert under_attack(base, outcome, rounds) == ["kernel"] * rounds


@needs_root
@each_length
def test_p18_nor_loaded_where_memory_files_cannot_be_run(base, rounds):
    def work():
        with patched(os, memfd_create=lambda *_: (_ for _ in ()).throw(OSError(1, "denied"))):
            return outcome()

    assert under_attack(base, work, rounds) == ["kernel"] * rounds


@needs_root
def test_p18_what_a_compiler_writes_is_private(base, monkeypatch):
    """Its temporary files too: the compiler sees a TMPDIR that nobody else can read or write."""
    seen = base / "seen"
    script = f'stat -c "%a %u" "$TMPDIR" "$(dirname "$out")" >>"{seen}"; real "$@"'
    monkeypatch.setenv("CXX", compiler(base, script))
    for mask in (0o000, 0o002, 0o077):
        before = os.umask(mask)
        try:
            assert Child(outcome).result() == "kernel"
        finally:
            os.umask(before)
        shutil.rmtree(base / "cache")
    assert set(seen.read_text().splitlines()) == {f"700 {os.geteuid()}"}


# --- P19 ------------------------------------------------------------------------------------------


def _cxx(script, **options):
    return lambda base: os.environ.update(CXX=compiler(base, script, **options))


def _env(**variables):
    return lambda base: os.environ.update(variables)


def _no_home(base):
    for name in ("HOME", "XDG_CACHE_HOME", "NEURONJIT_CACHE_DIR"):
        os.environ.pop(name, None)


def _full(base):
    (base / "full").mkdir()
    _mount(base / "full", "size=4k,mode=0700")
    (base / "full" / "file").write_bytes(bytes(4096))
    os.environ["TMPDIR"] = str(base / "full")


def _file(base):
    (base / "file").touch()
    os.environ["TMPDIR"] = str(base / "file")


def _gone(base):
    (base / "gone").mkdir()
    os.chdir(base / "gone")
    (base / "gone").rmdir()


def _no_rights(base):
    (base / "text").write_text("")
    os.environ["CXX"] = str(base / "text")


def _limited(which, number):
    return lambda base: _limit(getattr(resource, which), number)


ECHO = 'real "$@"; code=$?'
# what is wrong, and what the engine may give then
CELLS = {
    "no compiler": (_env(CXX="/nowhere/c++"), {"BackendError"}),
    "no PATH": (_env(PATH=""), {"BackendError"}),
    "CXX has no rights": (_no_rights, {"BackendError"}),
    "CXX cannot be read": (_env(CXX="g++ 'x"), {"BackendError"}),
    "CXX is a folder": (lambda base: os.environ.update(CXX=str(base)), {"BackendError"}),
    "--version fails": (_cxx("", version="exit 3"), {"BackendError"}),
    "--version hangs": (_cxx("", version="sleep 1000"), {"BackendError"}),
    "--version in Latin-1": (_cxx(ECHO, version="printf 'Gr\\xfc\\xdfe\\n'"), {"kernel"}),
    "--version says nothing": (_cxx(ECHO, version="true"), {"kernel"}),
    "removed after --version": (_cxx("", version='rm "$0"'), {"CompileError"}),
    "killed": (_cxx("kill -9 $$"), {"CompileError"}),
    "out of memory": (_cxx('ulimit -v 20000; real "$@"'), {"CompileError"}),
    "exits 1": (_cxx("exit 1"), {"CompileError"}),
    "hangs": (_cxx("sleep 1000"), {"CompileError"}),
    "hangs, without end": (_cxx("trap '' TERM; while :; do sleep 1; done"), {"CompileError"}),
    "closes its words and hangs": (_cxx("exec >&- 2>&-; sleep 1000"), {"CompileError"}),
    "fails in Latin-1": (_cxx("printf 'f\\xfcr \\xe9' >&2; exit 1"), {"CompileError"}),
    "warns in Latin-1": (_cxx(f"printf 'f\\xfcr' >&2; {ECHO}"), {"kernel"}),
    "100 MB of words": (_cxx(f"head -c 100000000 /dev/zero >&2; {ECHO}"), {"kernel"}),
    "words without end": (_cxx("yes; yes >&2"), {"CompileError"}),
    "leaves a server running": (_cxx(f"sleep 30 & {ECHO}"), {"kernel"}),
    "TMPDIR is missing": (_env(TMPDIR="/nowhere"), {"kernel"}),
    "TMPDIR is a file": (_file, {"kernel"}),
    "TMPDIR is full": (_full, {"CompileError"}),
    "TMPDIR cannot be written": (_env(TMPDIR="/proc"), {"kernel"}),
    # the first is said where the compiler has not been asked for its version yet
    "no place for temporary files": (
        lambda base: setattr(scratch, "_places", list), {"BackendError", "CompileError"}
    ),
    "no home": (_no_home, {"kernel"}),
    "the working directory is gone": (_gone, {"kernel"}),
    "no files may be written": (_limited("RLIMIT_FSIZE", 0), {"CompileError"}),
}  # fmt: skip


@needs_root
@pytest.mark.parametrize("name", CELLS)
def test_p19_the_machine_raises_no_error_of_its_own(base, name):
    enter, allowed = CELLS[name]

    def work():
        short = "hang" in name or "end" in name
        scratch.TIMEOUT_S = cpu._VERSION_TIMEOUT_S = 1.0 if short else 60.0
        enter(base)
        return outcome()

    assert Child(work).finish(120)["value"] in allowed


def test_p19_no_more_descriptors(base):
    """So many may be opened besides those that are open: from none to enough."""

    def work(more):
        used = {int(name) for name in os.listdir("/proc/self/fd")}
        number = next(n for n in itertools.count() if len(set(range(n)) - used) >= more)
        _limit(resource.RLIMIT_NOFILE, number)
        return outcome()

    found = [Child(work, more).result() for more in range(13)]
    assert found[0] != "kernel" and set(found) <= {"kernel", "BackendError", "CompileError"}
    assert Child(work, 30).result() == "kernel"


@needs_root
def test_p19_no_more_processes(base):
    """Another user, because limits do not bind root."""
    os.chown(base / "cache", ALICE, ALICE)

    def setup():
        _limit(resource.RLIMIT_NPROC, 1)

    assert Child(outcome, uid=ALICE, setup=setup).result() in ("BackendError", "CompileError")


def test_a_missing_compiler_is_looked_for_once(base, monkeypatch):
    looked = []
    monkeypatch.setattr(shutil, "which", lambda *a, **k: looked.append(a))
    for path in ("/one", "/two", "/one", "/two"):
        monkeypatch.setenv("PATH", path)
        for _ in range(3):
            with pytest.raises(nj.BackendError, match="looked for"):
                cpu.compiler()
    assert len(looked) == 4  # g++ and clang++, for each PATH
    monkeypatch.undo()
    assert cpu.compiler() == [REAL]


def test_a_failure_is_not_remembered(base, monkeypatch):
    flag = base / "works"
    monkeypatch.setenv("CXX", compiler(base, f'[ -e "{flag}" ] || exit 1; real "$@"'))
    for _ in range(2):
        with pytest.raises(nj.CompileError, match="exit code 1"):
            build.load_kernel(SPEC)
    flag.touch()
    assert build.load_kernel(SPEC) and right(backend="cpu")


# --- P20 ------------------------------------------------------------------------------------------


def _left(place):
    return [name for name in os.listdir(place) if name.startswith("neuronjit-")]


def _compilers(place):
    """Processes whose TMPDIR lies below this place."""
    found = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        try:
            if f"TMPDIR={place}/neuronjit-".encode() in path.read_bytes():
                found.append(path.parent.name)
        except OSError:  # noqa: PERF203
            pass
    return found


def _sources(place):
    return len([*place.glob("neuronjit-*/kernel.cpp")])


def _until(condition):
    end = time.monotonic() + 20
    while not condition() and time.monotonic() < end:
        time.sleep(0.01)


def _another(number):
    """A kernel that no other test has."""
    model = nj.NeuronModel(f"another{number}", "h = v + x", state=dict(v=0.0))
    return replace(SPEC, model=model)


def _compile_for_ever(first):
    for number in itertools.count(first):
        build.load_kernel(_another(number))


def test_p20_kills_leave_nothing_for_long(base, monkeypatch):
    place = base / "tmp"
    place.mkdir(mode=0o700)
    monkeypatch.setenv("TMPDIR", str(place))
    generator, left = random.Random(0), 0
    for number in range(1, 21):
        before, child = _sources(place), Child(_compile_for_ever, 1000 * number)
        _until(lambda before=before: _sources(place) > before)
        time.sleep(generator.random() * 0.2)
        child.kill()
        child.wait_status()
        left = max(left, len(_left(place)))
    assert left > 5  # else this shows nothing
    sound = place / "neuronjit-cache"  # what only looks like ours stays
    sound.mkdir()
    for name in _left(place):
        os.utime(place / name, (1, 1))
    assert Child(lambda: bool(build.load_kernel(_another(0)))).result()
    assert [name for name in _left(place) if (place / name).stat().st_mtime < 10] == [sound.name]


@pytest.mark.parametrize("script", ['real "$@"', "sleep 1000", "sleep 1000 & sleep 1000"])
def test_p20_interrupts_and_timeouts_leave_nothing(base, monkeypatch, script):
    place = base / "tmp"
    place.mkdir(mode=0o700)
    monkeypatch.setenv("TMPDIR", str(place))
    monkeypatch.setenv("CXX", compiler(base, script))
    generator = random.Random(0)

    def interrupted():
        # a shell's background jobs, and what they start, ignore the signal
        signal.signal(signal.SIGINT, signal.default_int_handler)
        try:
            _compile_for_ever(1)
        except KeyboardInterrupt:
            _until(lambda: not _compilers(place))  # killed, but not yet gone
            return _left(place), _compilers(place)

    for _ in range(5):
        child = Child(interrupted)
        _until(lambda: _left(place))
        time.sleep(generator.random() * 0.3)
        os.kill(child.pid, signal.SIGINT)
        assert child.result() == [[], []]
    if "sleep" in script:
        monkeypatch.setattr(scratch, "TIMEOUT_S", 0.3)
        with pytest.raises(nj.CompileError, match="stopped after"):
            build.load_kernel(SPEC)
        _until(lambda: not _compilers(place))
        assert _left(place) == _compilers(place) == []


# --- P23 ------------------------------------------------------------------------------------------


def chain(count):
    lines = [f"a{i} = {('exp', 'sin')[i % 2]}(a{i - 1} * 0.5 - 0.1)" for i in range(1, count)]
    text = "\n".join(["a0 = x", *lines, f"h = v + (a{count - 1} - v) * k"])
    return nj.NeuronModel(f"chain{count}", text, state=dict(v=0.0), params=dict(k=0.5))


def ladder(count):
    """So many states, each driven by the one before it."""
    lines = [f"z{i} = z{i} * 0.9 + {f'z{i - 1}' if i else 'x'} * 0.1" for i in range(count - 1)]
    text = "\n".join([*lines, f"h = v + (z{count - 2} - v) * k"])
    states = {f"z{i}": 0.0 for i in range(count - 1)}
    return nj.NeuronModel(f"ladder{count}", text, state={**states, "v": 0.0}, params=dict(k=0.5))


SEVEN = ["if", "lif", "plif", "qif", "eif", "izhikevich", "lif_no_decay", "plif_no_decay"]
# by (target, direction, most lanes): K/lanes/loads, + where rows are loaded ahead, = for K steps
SHAPES = {
    ("cpu", "forward", 1): "4/64/1 8/64/1 16/64/1",
    ("cpu", "backward", 1): "4/64/1 8/64/1 16/64/1",
    ("cuda", "forward", 1): "4/1/4 8/1/8 16/1/8 16/1/16 16/1/16+",
    ("cuda", "forward", 2): "4/1/4 4/2/4 8/1/8 8/2/8 16/1/8 16/1/16 16/1/16+ 16/2/8 16/2/16",
    ("cuda", "forward", 4): "4/1/4 4/2/4 4/4/4 8/1/8 8/2/8 8/4/8 16/1/8 16/1/16 16/1/16+ 16/2/8"
    " 16/2/16 16/4/8 16/4/16",
    ("cuda", "backward", 1): "4/1/4 8/1/8 16/1/16 16/1/16+",
    ("cuda", "backward", 2): "4/1/4 4/2/4 8/1/8 8/2/8 16/1/16 16/1/16+ 16/2/16 16/2/16+",
    ("cuda", "backward", 4): "4/1/4 4/2/4 4/4/4 4/4/4= 8/1/8 8/2/8 8/4/8 8/4/8= 16/1/16 16/1/16+"
    " 16/2/16 16/2/16+ 16/4/16 16/4/16=",
}


@pytest.mark.parametrize("name", ["lif", "izhikevich"])
def test_p23_built_in_models_keep_their_shapes(name):
    model = nj.neurons.by_name(name)
    for target, direction, size, sequences in itertools.product(
        ("cpu", "cuda"), ("forward", "backward"), (2, 4), (1, 2)
    ):
        lanes = 1 if target == "cpu" else min(8 // size, 4 // len(model.state))
        wide, one = (SHAPES[target, direction, n].split() for n in (lanes, 1))
        if sequences > 1:  # with several lanes for four steps only
            wide = [s for s in wide if s[0] == "4"] + [s for s in one if s[0] != "4"]
        found = targets.shapes(target, direction, size, model, sequences)
        written = [
            f"{k}/{at}/{loads}{'+' * ahead}{'=' * whole}" for k, at, loads, ahead, whole in found
        ]
        assert written == wide, (target, direction, size, sequences)


@pytest.mark.parametrize("name", SEVEN)
def test_p23_all_built_in_models_have_the_shapes_of_these(name):
    model = nj.neurons.by_name(name)
    like = nj.neurons.by_name("izhikevich" if len(model.state) > 1 else "lif")
    sizes = itertools.product((1, 96, 1 << 18, 1 << 24), (1, 4, 5, 8, 9, 100), (True, False))
    for target, direction, size, given in itertools.product(
        ("cpu", "cuda"), ("forward", "backward"), (2, 4, 8), sizes
    ):
        shape = targets.by_name(target).shape
        expected = shape(direction, size, like, 1, *given)
        four_of_16 = expected.interval == 16 and expected.lanes == 4
        if name == "eif" and direction == "backward" and four_of_16:
            expected = expected._replace(lanes=2, whole=False)  # four would spill on sm_90
        assert shape(direction, size, model, 1, *given) == expected
    assert not KernelSpec.of(name, "cpu", "backward", "atan", "hard", False, "float32").is_large


def test_p23_no_built_in_surrogate_is_large():
    for surrogate in vars(nj.surrogates).values():
        if isinstance(surrogate, nj.Surrogate):
            spec = KernelSpec.of("lif", "cpu", "backward", surrogate, "hard", False, "float32")
            assert not spec.is_large, surrogate


def test_p23_fewer_steps_of_longer_ones():
    """One limit for every T, which a graph with a symbol for T relies on."""
    for model, k in [
        (chain(3), 16), (chain(10), 4), (chain(20), 2), (chain(40), 1), (chain(200), 1),
        (ladder(3), 8), (ladder(10), 8), (ladder(30), 4), (ladder(60), 2), (ladder(100), 1),
    ]:  # fmt: skip
        assert common.steps_between_checkpoints(sys.maxsize, model) == k, model
        for steps in range(1, 40):
            here = common.steps_between_checkpoints(steps, model)
            assert (steps - 1) // here == (steps - 1) // k
    assert common.is_long(chain(20)) and common.is_long(ladder(30)) and not common.is_long(chain(5))


@pytest.mark.slow
@pytest.mark.parametrize("model", [chain(200), ladder(100)], ids=lambda model: model.name)
def test_p23_large_blocks_compile_and_are_right(model):
    x = inputs((5, 9)).requires_grad_()
    results = []
    for backend in ("cpu", "eager"):
        out = nj.multistep(model, x, backend=backend)
        (grad,) = torch.autograd.grad(out.spikes.sum() + out.state["v"].square().sum(), x)
        results.append((out.spikes, out.state["v"], grad))
    assert results[0][0].equal(results[1][0])
    for mine, want in zip(*(r[1:] for r in results), strict=True):
        torch.testing.assert_close(mine, want, rtol=1e-4, atol=1e-5)
    for direction in ("forward", "backward"):
        spec = KernelSpec.of(model, "cuda", direction, "atan", "hard", False, "float32")
        shape = cuda.shape(direction, 4, model, int(direction == "backward"), 4096, 100, True)
        spec = replace(spec, **shape._asdict())
        assert shape == (1, 1, 1, False, False)
        binary = cuda.compile(render_specs([spec]), spec.symbol, "sm_90", spec.is_large)
        assert cuda.check(binary, spec.symbol, "sm_90") == ""


def test_p23_long_compiling_is_told(base, monkeypatch):
    monkeypatch.setattr(build, "TELL_AFTER_S", 0.1)
    monkeypatch.setenv("CXX", compiler(base, 'sleep 1; real "$@"'))
    with cachekit.logged() as lines:
        build.load_kernel(SPEC)
    assert len(lines) == 1 and SPEC.symbol in lines[0] and "0 s" in lines[0]


# --- forks ----------------------------------------------------------------------------------------

FORK = """
import os, sys, hashlib, torch
early, depth = sys.argv[1] == "early", int(sys.argv[2])
if early:
    import neuronjit as nj
torch.set_num_threads(4)
x = torch.rand(64, 8192, generator=torch.Generator().manual_seed(0))
(x + x).sum()  # torch's OpenMP threads run
for _ in range(depth):
    child = os.fork()
    if child:
        _, status = os.waitpid(child, 0)
        sys.stdout.flush()
        os._exit(os.waitstatus_to_exitcode(status))
import neuronjit as nj
out = nj.multistep(nj.neurons.LIF, x, backend="cpu")
print(hashlib.sha256(out.spikes.numpy().tobytes()).hexdigest(), flush=True)
sys.stdout.flush()
os._exit(0)
"""
WORKERS = """
import torch, neuronjit as nj
from torch.utils.data import DataLoader
x = torch.rand(64, 8192, generator=torch.Generator().manual_seed(0))
torch.set_num_threads(4)
(x + x).sum()
class Data:
    def __len__(self):
        return 4
    def __getitem__(self, index):
        torch.set_num_threads(4)
        return nj.multistep(nj.neurons.LIF, x, backend="cpu").spikes.numpy().sum().item()
first = {float(v) for batch in DataLoader(Data(), num_workers=2) for v in batch}
assert first == {nj.multistep(nj.neurons.LIF, x).spikes.sum().item()}, first
print("right")
"""


def run(code, *arguments):
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_p24_the_first_kernel_in_a_fork_after_torchs_threads_ran(base):
    expected = run(FORK, "early", "0")
    for when, depth in (("early", "1"), ("late", "2")):
        assert run(FORK, when, depth) == expected


def test_p24_the_first_kernel_in_a_data_loaders_worker(base):
    assert run(WORKERS) == "right\n"


# --- archs ----------------------------------------------------------------------------------------


@pytest.mark.nvrtc
def test_prebuild_names_the_archs_that_nvrtc_knows(base):
    for arch in ("sm_999", "sm_20", "sm_90b", "sm_9٠"):
        with pytest.raises(nj.SpecError, match=r"Known: .*sm_90.*sm_100"):
            ahead.jobs([], lambda target: [], (), [arch])
    assert cuda.check_arch("sm_90a") == "sm_90a"
    assert cuda.check_arch("sm_130", recorded=True) == "sm_130"


@pytest.mark.nvrtc
def test_a_gpu_newer_than_nvrtc_gets_ptx(base):
    spec = KernelSpec.of("if", "cuda", "forward", "atan", "hard", False, "float32")
    binary = build.entry(spec, "sm_130").binary
    assert binary.endswith(b"}\n\n\0") or binary.rstrip(b"\0\n").endswith(b"}")
    assert b".target sm_1" in binary and binary.endswith(b"\0")
    assert build.entry(spec, "sm_130").binary == binary
