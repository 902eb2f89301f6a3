"""The cache in trouble: no room, dead holders, odd names and times, owners, other systems."""

import contextlib
import ctypes
import errno
import grp
import os
import pwd
import runpy
import stat
import subprocess
import sys
import threading
import time
import types
import warnings
from pathlib import Path

import cachekit
import pytest
from cachekit import (
    ALICE,
    BARE,
    MALLORY,
    Child,
    crowd,
    get,
    heard,
    key,
    needs_linux,
    needs_root,
    patched,
    put,
    right,
    toy,
    use,
)
from promises_places import _acl

from neuronjit import settings
from neuronjit.cache import admin, folders, locks, store

pytestmark = needs_linux


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A cache directory that is not there yet, and a place of its own for locks."""
    for name in ("NEURONJIT_CACHE_DIR", "NEURONJIT_CACHE_PATH", "NEURONJIT_CACHE_SIZE"):
        monkeypatch.setenv(name, "")
    monkeypatch.setattr(locks, "lock_folders", lambda: [str(tmp_path / "locks")])
    yield use(tmp_path / "cache")
    cachekit.forget()


def lock_files(tmp_path):
    return [path for path in (tmp_path / "locks").iterdir() if path.is_file()]


def refuse(number):
    def write(self, name, data, mode=0o600):
        raise OSError(number, os.strerror(number))

    return write


# Nothing can be published


@pytest.mark.parametrize("why", ["ENOSPC", "EDQUOT", "EROFS", "EIO", "larger than the cap"])
def test_who_waits_for_what_cannot_be_published_builds_at_once(place, tmp_path, monkeypatch, why):
    """Each build but the first ends when all of the others have begun: one by one, none does."""
    crew, begun = 5, tmp_path / "begun"
    begun.mkdir()
    write = folders.Folder.write
    if why == "larger than the cap":
        monkeypatch.setenv("NEURONJIT_CACHE_SIZE", "2K")
    else:
        write = refuse(getattr(errno, why))

    def build():
        with contextlib.suppress(FileExistsError), open(begun / "first", "x"):
            until = time.monotonic() + 0.5  # until the others wait
            while time.monotonic() < until:
                time.sleep(0.01)
            return toy(1)
        (begun / str(os.getpid())).touch()
        until = time.monotonic() + 20
        while len(os.listdir(begun)) < crew and time.monotonic() < until:
            time.sleep(0.01)
        together.append(len(os.listdir(begun)))
        return toy(1)

    together = []

    def work(index):
        with patched(folders.Folder, write=write), heard() as texts:
            good = right(store.load_or_make(key(1), build), 1)
        return good, together, len(texts)

    found = crowd(crew, work)
    assert all(good and warned == 1 for good, _, warned in found)
    assert sorted(seen for _, seen, _ in found) == [[], *[[crew]] * (crew - 1)]


def test_all_wait_for_one_again_a_while_later(place, tmp_path):
    with patched(folders.Folder, write=refuse(errno.ENOSPC)), heard():
        get(1)
    (note,) = lock_files(tmp_path)
    os.utime(note, (time.time() - 2 * locks.FRUITLESS_S,) * 2)
    built = tmp_path / "built"

    def work(index):
        cachekit.forget()
        return right(get(1, built=built, pause=0.1), 1)

    assert crowd(4, work) == [True] * 4
    assert built.read_bytes() == b"x"
    assert lock_files(tmp_path) == []


# What the dead leave


def test_p20_locks_of_the_killed_are_swept(place, tmp_path):
    """200 holders are killed in the middle of a build; then one sound call."""

    def die(number):
        store.load_or_make(key(number), lambda: os.kill(os.getpid(), 9))

    for first in range(0, 200, 20):
        children = [Child(die, number) for number in range(first, first + 20)]
        assert all(os.WIFSIGNALED(child.wait_status()) for child in children)
    left = lock_files(tmp_path)
    assert len(left) == 200
    young = left[:50]
    for path in left[50:]:
        os.utime(path, (time.time() - 2 * folders.STALE_TEMP_S,) * 2)
    get(1000)
    assert sorted(lock_files(tmp_path)) == sorted(young)
    for path in young:
        os.utime(path, (1, 1))
    get(1001)
    assert lock_files(tmp_path) == []


@pytest.mark.parametrize("holder", ["another process", "another thread"])
def test_a_lock_that_is_held_is_not_swept_however_old(place, tmp_path, holder):
    started, done = threading.Event(), threading.Event()
    flag = tmp_path / "started"

    def hold():
        with locks.key_lock(str(place), key(1)):
            flag.touch()
            started.set()
            done.wait(60)

    if holder == "another process":
        other = Child(hold)
    else:
        other = threading.Thread(target=hold)
        other.start()
        started.wait(60)
    while not flag.exists():
        time.sleep(0.005)
    (held,) = lock_files(tmp_path)
    os.utime(held, (1, 1))
    get(2)
    assert lock_files(tmp_path) == [held]
    waiting = Child(lambda: right(get(1), 1))
    with pytest.raises(cachekit.Died, match="hangs"):
        waiting.result(0.5)  # the holder has it still
    if holder == "another process":
        other.kill()
        other.wait_status()
    else:
        done.set()
        other.join()


def test_strangers_among_the_locks_stay(place, tmp_path):
    get(1)
    folder = tmp_path / "locks"
    (folder / "notes").write_text("mine")
    (folder / ("e" * 64)).mkdir()
    for path in folder.iterdir():
        os.utime(path, (1, 1))
    get(2)
    assert sorted(os.listdir(folder)) == ["e" * 64, "notes"]


# Odd names and clocks


@pytest.mark.parametrize("full", [False, True], ids=["empty", "with something in it"])
def test_a_directory_that_took_a_kernels_name_makes_room(place, tmp_path, full):
    place.mkdir(mode=0o700)
    (place / key(1)).mkdir()
    if full:
        (place / key(1) / "dear").write_text("to somebody")
    built = tmp_path / "built"
    checked, (finding,) = admin.verify()
    assert (checked, finding.key, finding.why) == (1, key(1), "it is a directory")
    (listed,) = admin.entries()
    assert listed.problem == "it is a directory"

    def work():
        return right(get(1, built=built), 1)

    found = [Child(work).finish() for _ in range(3)]
    assert [one["value"] for one in found] == [True] * 3
    assert [len(one["warnings"]) for one in found] == [1, 0, 0]
    assert "it is a directory" in found[0]["warnings"][0]
    assert built.read_bytes() == b"x" and (place / key(1)).is_file()
    left = [name for name in os.listdir(place) if name != key(1)]
    if full:
        assert left[0].startswith(f"{key(1)}.was-a-directory.")
        assert (place / left[0] / "dear").read_text() == "to somebody"
    assert len(left) == full


def test_verify_removes_such_a_directory_if_it_is_empty(place):
    place.mkdir(mode=0o700)
    (place / key(1)).mkdir()
    (place / key(2)).mkdir()
    (place / key(2) / "dear").write_text("to somebody")
    _, found = admin.verify(fix=True)
    assert {finding.key: finding.removed for finding in found} == {key(1): True, key(2): False}
    assert os.listdir(place) == [key(2)] and (place / key(2) / "dear").exists()


def test_a_kernel_that_another_process_put_there_meanwhile_is_not_moved_away(place):
    """Between our failed rename and our moving the directory away, another one has healed it."""
    get(1)
    before = (place / key(1)).stat().st_ino
    with (
        folders.opened(str(place)) as folder,
        patched(folder, unlink=lambda *_: False),
        pytest.raises(NotADirectoryError),
    ):
        folder._move_away(key(1))
    assert (place / key(1)).stat().st_ino == before and os.listdir(place) == [key(1)]


ABSURD = [0, -1, -(2**40), 2**40, 2**53, 2**62]


@pytest.mark.parametrize("when", ABSURD)
def test_absurd_times_cost_nothing(place, when):
    names = [key(1), "tmp." + "0" * 32]
    get(1)
    (place / names[1]).write_bytes(b"half")
    real = folders.Folder.stat

    def odd(self, name):
        st = real(self, name)
        if name not in names:
            return st
        return os.stat_result(
            (*st[:7], when, when, when),
            {"st_atime": float(when), "st_mtime": float(when), "st_ctime": float(when)}
            | {"st_mtime_ns": when * 10**9, "st_rdev": st.st_rdev},
        )

    with contextlib.suppress(OSError, OverflowError):  # what this file system takes, for real
        for name in names:
            os.utime(place / name, (when, when))
    with patched(folders.Folder, stat=odd), heard() as texts:
        cachekit.forget()
        assert right(get(1), 1) and right(get(2), 2)
        assert len(list(admin.entries())) == 2
        assert admin.verify() == (2, [])
        assert isinstance(admin.clear(older_than=3600.0), tuple)
    assert texts == [] and sorted(cachekit.other_files(place)) == []


# Warnings that are errors


def _no_directory(place):
    place.write_text("a file")


def _open_to_all(place):
    place.mkdir()
    place.chmod(0o777)


def _damaged(place):
    place.mkdir(mode=0o700)
    put(1, place, data=b"damaged")


def _locks_open_to_all(place):
    (place.parent / "locks").mkdir()
    (place.parent / "locks").chmod(0o777)


TROUBLES = {
    "no directory": (_no_directory, None, {}),
    "open to all": (_open_to_all, None, {}),
    "damaged": (_damaged, None, {}),
    "locks open to all": (_locks_open_to_all, None, {}),
    "a directory has its name": (lambda place: (place / key(1)).mkdir(parents=True), None, {}),
    "no such size": (lambda place: None, None, {"NEURONJIT_CACHE_SIZE": "many"}),
    "larger than the cap": (lambda place: None, None, {"NEURONJIT_CACHE_SIZE": "2K"}),
    "no space": (lambda place: None, errno.ENOSPC, {}),
}


@pytest.mark.parametrize("name", TROUBLES)
def test_a_warning_that_is_an_error_is_raised_once_and_leaves_all_sound(place, tmp_path, name):
    prepare, refused, variables = TROUBLES[name]
    prepare(place)
    built = tmp_path / "built"
    write = folders.Folder.write if refused is None else refuse(refused)

    def work():
        os.environ.update(variables)
        before = len(os.listdir("/proc/self/fd"))
        with warnings.catch_warnings(), patched(folders.Folder, write=write):
            warnings.simplefilter("error")
            with pytest.raises(settings.CacheWarning):
                get(1, built=built)
            good = [right(get(1, built=built), 1) for _ in range(2)]
        return good, len(os.listdir("/proc/self/fd")) - before, Child(other).finish(20)["value"]

    def other():
        with patched(folders.Folder, write=write):
            return right(get(1), 1)

    assert Child(work).result() == [[True, True], 0, True]
    assert built.read_bytes() == b"x"  # no build was lost by the exception
    if place.is_dir():
        assert [n for n in cachekit.other_files(place) if n.startswith("tmp.")] == []


def test_a_warning_is_given_at_the_users_line(place, tmp_path):
    place.write_text("a file")
    script = tmp_path / "train.py"
    script.write_text("from neuronjit.cache import store\nstore.load(key)\n")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        runpy.run_path(str(script), {"key": key(1)})
    assert [(w.filename, w.lineno) for w in caught] == [(str(script), 2)]


# Owners and groups


PRIVATE = {
    "name, number and members": ({}, 0o775, True),
    "listed as its own member": ({"gr_mem": ["alice"]}, 0o775, True),
    "another member": ({"gr_mem": ["alice", "mallory"]}, 0o775, False),
    "another name": ({"gr_name": "users"}, 0o775, False),
    "another number": ({"gid": 54300}, 0o775, False),
    "another first group": ({"pw_gid": 100}, 0o775, False),
    "no such group": ({"gr_name": None}, 0o775, False),
    "open to all": ({}, 0o777, False),
    "an access list": ({"acl": MALLORY}, 0o775, False),
}


@needs_root
@pytest.mark.parametrize("at", ["home", "home/cache"])
@pytest.mark.parametrize("name", PRIVATE)
def test_where_the_umask_is_002_a_private_group_is_trusted(name, at):
    changed, mode, trusted = PRIVATE[name]
    gid = changed.get("gid", ALICE)

    def getgrgid(number):
        if changed.get("gr_name", "alice") is None:
            raise KeyError(number)
        group = {"gr_name": "alice", "gr_gid": number, "gr_mem": []}
        return types.SimpleNamespace(**{**group, **changed})

    def getpwuid(number):
        return types.SimpleNamespace(pw_name="alice", pw_gid=changed.get("pw_gid", ALICE))

    def work():
        os.umask(0o002)
        with patched(grp, getgrgid=getgrgid), patched(pwd, getpwuid=getpwuid):
            good, (user, *_) = right(get(1), 1), admin.directories()
            return good, user.trusted, user.lenient

    with cachekit.for_all_users() as base:
        place = use(base / "home" / "cache")
        for path in (place.parent, place):
            path.mkdir()
            os.chown(path, ALICE, gid)
            path.chmod(mode if path == base / at else 0o700)
        if "acl" in changed:
            _acl(base / at, changed["acl"])
        found = Child(work, uid=ALICE).finish()
        good, allowed, lenient = found["value"]
        assert good and allowed == trusted
        assert len(found["warnings"]) == (not trusted)
        if trusted:
            assert len(lenient) == 1 and str(base / at) in lenient[0] and "alone" in lenient[0]
            assert stat.S_IMODE((place / key(1)).stat().st_mode) == 0o600
        else:
            assert lenient == [] and str(base / at) in found["warnings"][0]


def user_namespace(inside=ALICE):
    """Where only one user is mapped, as `inside`; or none. All others look like 65534."""
    libc = ctypes.CDLL(None, use_errno=True)
    uid, gid = os.geteuid(), os.getegid()
    libc.prctl(4, 1, 0, 0, 0)  # dumpable again, or /proc/self is root's
    if libc.unshare(0x10000000):
        raise OSError(ctypes.get_errno(), "unshare")
    if inside is not None:
        Path("/proc/self/setgroups").write_text("deny")
        Path("/proc/self/uid_map").write_text(f"{inside} {uid} 1")
        Path("/proc/self/gid_map").write_text(f"{inside} {gid} 1")
    cachekit.forget()


@pytest.fixture
def namespaces():
    try:
        Child(user_namespace, uid=ALICE).result()
    except cachekit.Died:
        pytest.skip("this kernel gives users no namespaces")


# who owns what, as it is outside: the parent, its mode, the cache, its mode, a planted kernel
NAMESPACES = {
    "all of it ours": ((ALICE, 0o755, ALICE, 0o700, None), True),
    "the parent is root's": ((0, 0o755, ALICE, 0o700, None), True),
    "the parent is root's and sticky": ((0, 0o1777, ALICE, 0o700, None), True),
    "the parent is open to all": ((0, 0o777, ALICE, 0o700, None), False),
    "the parent is open to its group": ((0, 0o775, ALICE, 0o700, None), False),
    "the cache is root's": ((0, 0o755, 0, 0o755, None), False),
    "the cache is another user's": ((0, 0o755, MALLORY, 0o755, None), False),
    "the kernel is another user's": ((0, 0o755, ALICE, 0o700, MALLORY), False),
}


@needs_root
@pytest.mark.parametrize("inside", [ALICE, 0, None], ids=["as itself", "as root", "unmapped"])
@pytest.mark.parametrize("name", NAMESPACES)
def test_p24_in_a_user_namespace(namespaces, name, inside):
    """As in a rootless container: / belongs to nobody that is known there."""
    (parent, parent_mode, owner, mode, kernel), trusted = NAMESPACES[name]
    trusted = trusted and inside is not None  # our own files look like everybody's

    def work():
        user_namespace(inside)
        assert os.stat("/").st_uid == 65534
        with patched(locks, lock_folders=list):
            loaded = store.load(key(1))
            built = get(1)
        user, *_ = admin.directories()
        planted = any(e is not None and e.binary == b"planted" for e in (loaded, built))
        return planted, right(built, 1), user.lenient

    with cachekit.for_all_users() as base:
        place = use(base / "parent" / "cache")
        for path, uid, bits in ((place.parent, parent, parent_mode), (place, owner, mode)):
            path.mkdir()
            os.chown(path, uid, uid)
            path.chmod(bits)
        if kernel is not None:
            entry = toy(1)
            planted = store.Entry(entry.key, entry.meta, entry.source, b"planted")
            data = cachekit.entries.encode(planted)
            os.chown(put(1, place, data=data, mode=0o644), kernel, kernel)
        found = Child(work, uid=ALICE).finish()
        ran, good, lenient = found["value"]
        assert good and not ran
        assert len(found["warnings"]) == (not trusted), found["warnings"]
        kept = trusted or (kernel is not None and inside is not None)
        if kept:
            assert lenient[0].startswith("'/' belongs to somebody outside")
            assert (place / key(1)).stat().st_uid == ALICE
        else:
            assert not (place / key(1)).exists() or kernel is not None


@needs_root
@pytest.mark.parametrize("number", [errno.EMFILE, errno.EACCES, errno.EIO])
def test_what_cannot_be_read_about_a_namespace_is_not_trusted(namespaces, number):
    """For once, no descriptor is free: our own files may be anybody's, and are judged again."""

    def fail(*_):
        raise OSError(number, os.strerror(number))

    def work():
        user_namespace(None)
        with patched(folders, _stand_in=fail):
            first = store.load(key(1)) is None
        return first, store.load(key(1)) is None

    with cachekit.for_all_users() as base:
        place = use(base / "cache")
        place.mkdir(mode=0o755)
        os.chown(place, MALLORY, MALLORY)
        os.chown(put(1, place, mode=0o644), MALLORY, MALLORY)
        assert Child(work, uid=ALICE).result() == [True, True]


# Other systems


STRIPPED = """
import torch, platformdirs, jinja2, rich
import concurrent.futures, os, shutil, subprocess, sys, tempfile, threading
for name in ("fcntl", "grp", "pwd", "resource"):
    sys.modules[name] = None
for name in ("O_DIRECTORY", "O_NOFOLLOW", "O_CLOEXEC", "O_NONBLOCK", "O_PATH", "geteuid", "getuid",
             "getegid", "getgid", "getgroups", "fchmod", "fstatvfs", "listxattr", "getxattr",
             "memfd_create", "MFD_CLOEXEC", "MFD_ALLOW_SEALING", "uname", "ST_RDONLY", *LACKING):
    delattr(os, name)
os.supports_dir_fd.clear(); os.supports_effective_ids.clear(); os.supports_follow_symlinks.clear()
import warnings
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import neuronjit as nj
    from neuronjit import cli
    from neuronjit.cache import admin
    x = torch.rand(4, 8, requires_grad=True)
    eager = nj.multistep("lif", x, backend="eager").spikes
    eager.sum().backward()
    if BACKEND == "cpu":  # no folder there can be judged, so no compiler works in it
        assert torch.equal(nj.multistep("lif", x).spikes, eager)
        try:
            nj.multistep("lif", x, backend="cpu")
        except nj.BackendError as error:
            assert "cannot show that nobody else writes there" in str(error)
        else:
            raise AssertionError("a compiler worked where anyone may write")
    assert cli.main(["info"]) == 0 and cli.main(["stats"]) == 0
print("texts", [str(w.message) for w in caught if "neuronjit" in type(w.message).__module__])
"""


@pytest.mark.parametrize("backend", ["eager", "cpu"])
def test_no_posix_module_is_needed(tmp_path, backend):
    """What Windows lacks is taken from this Python: the library runs, and keeps no files."""
    from neuronjit.kernels import targets

    if backend == "cpu" and targets.by_name("cpu").why_unavailable():
        pytest.skip("needs a C++ compiler")
    # subprocess itself needs register_at_fork where it forks: only there it stays
    lacking = ("register_at_fork", "pread", "pwrite") if backend == "eager" else ("pwrite",)
    code = f"LACKING, BACKEND = {lacking!r}, {backend!r}\n{STRIPPED}"
    environment = {**os.environ, "NEURONJIT_CACHE_DIR": str(tmp_path / "cache")}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    texts = done.stdout.splitlines()[-1]
    assert texts.count("cannot use the directory") == (backend == "cpu"), texts
    assert not (tmp_path / "cache").exists()


def test_without_file_locks_all_is_right(place):
    code = (
        BARE
        + "sys.modules['fcntl'] = None\nfrom cachekit import *\nprint(right(get(1), 1))\n"
        + "print(len(kernel_files(os.environ['NEURONJIT_CACHE_DIR'])))"
    )
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=False
    )
    assert (done.stdout, done.stderr) == ("True\n1\n", "")
