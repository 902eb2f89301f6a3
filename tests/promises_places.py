"""The cache's promises about environments, machines and hostile places, as experiments."""

from __future__ import annotations

import ctypes
import itertools
import os
import resource
import stat
import struct
import sys
import time
from pathlib import Path

import cachekit
from cachekit import ALICE, MALLORY, Child, crowd, get, key, patched, put, right, toy, use
from promises import compiles

from neuronjit.cache import admin, entries, folders, locks, store

NOBODY = 65534
MS_RDONLY, MS_NOEXEC, MS_REMOUNT, MS_REC, MS_PRIVATE = 1, 8, 32, 1 << 14, 1 << 18


def _mount(path, options="mode=0700", flags=0, kind=b"tmpfs"):
    """In a mount namespace of this process's own."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.unshare(0x20000)
    libc.mount(b"none", b"/", None, MS_REC | MS_PRIVATE, None)
    if libc.mount(b"none", os.fsencode(path), kind, flags, options.encode()):
        raise OSError(ctypes.get_errno(), "mount")


def _home(value=None, **env):
    """No variable of ours: the cache lies below HOME, if there is one."""
    for name in ("NEURONJIT_CACHE_DIR", "XDG_CACHE_HOME", "HOME", "USER", "LOGNAME"):
        os.environ.pop(name, None)
    os.environ |= {**env, **({} if value is None else {"HOME": str(value)})}


def _read_only_warm(place):
    _mount(place)
    get(1)
    os.utime(place / key(1), (1, 1))  # so old that a hit would be noted, could it be written
    _mount(place, flags=MS_REMOUNT | MS_RDONLY)
    cachekit.forget()
    sys.addaudithook(_refuse_writes)


def _refuse_writes(event, args):
    """An attempt to write would cost the cell."""
    flags = args[2] if event == "open" and isinstance(args[2], int) else 0
    writes = flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
    if writes or event in ("os.mkdir", "os.rename", "os.remove", "os.utime", "os.chmod"):
        raise RuntimeError(f"{event} {args}")


def _limit(which, number):
    resource.setrlimit(which, (number, resource.getrlimit(which)[1]))


def _unwritable_home(place):
    os.chown(place, 0, 0)
    place.chmod(0o755)
    _home(place)


# cell: how to get there, the user, warnings that are due, and files of kernels that are left
ENVIRONMENTS = {
    "read-only, warm": (_read_only_warm, 0, 0, 1),
    "read-only, cold": (lambda place: _mount(place, flags=MS_RDONLY), 0, 1, 0),
    "noexec": (lambda place: _mount(place, flags=MS_NOEXEC), 0, 0, 1),
    "disk of 8 KB": (lambda place: _mount(place, "size=8k,mode=0700"), 0, 1, 0),
    "HOME unset": (lambda place: _home(), NOBODY, 1, 0),
    "HOME cannot be written": (_unwritable_home, ALICE, 1, 0),
    "user unknown": (lambda place: _home(), 1002700000, 1, 0),
    "TMPDIR missing": (lambda place: os.environ.update(TMPDIR="/nowhere"), ALICE, 0, 1),
    "umask 077": (lambda place: os.umask(0o077), ALICE, 0, 1),
    "umask 000": (lambda place: os.umask(0o000), ALICE, 0, 1),
    "RLIMIT_FSIZE 0": (lambda place: _limit(resource.RLIMIT_FSIZE, 0), ALICE, 1, 0),
    "RLIMIT_NOFILE 32": (lambda place: _limit(resource.RLIMIT_NOFILE, 32), ALICE, 0, 1),
}


def p6_environment(directory, name):
    """One cell: kernels before and after, right and with the warnings that are due."""
    enter, uid, due, files = ENVIRONMENTS[name]
    place = Path(directory, "place")
    place.mkdir()
    os.chown(place, uid, uid)
    place.chmod(0o700)
    use(place)

    def work():
        size = 9000  # more than a disk of 8 KB takes
        if uid == 0:
            enter(place)
        with patched(locks, TIMEOUT_S=5.0):
            good = all(right(get(1, size), 1) for _ in range(2))
        left = cachekit.kernel_files(place) if os.access(place, os.R_OK) else []
        left += [name for name in cachekit.other_files(place) if name.startswith("tmp.")]
        modes = {stat.S_IMODE(os.stat(place / file).st_mode) for file in left}
        return good and modes <= {0o600}, len(left)

    def before():
        if uid:  # root keeps what it needs to mount, others are set up before they are others
            enter(place)

    found = Child(work, uid=uid, setup=before).finish()
    good, left = found["value"]
    return good and len(found["warnings"]) == due and left == files, found["warnings"]


def p11_nodes(directory, nodes=4, processes=4, keys=2, hidden=1.0):
    """Machines that share a directory but no locks; lookups that lag; clocks that are wrong."""
    place = Path(directory, "cache")

    def work(index):
        node = Path(directory, f"locks-of-node-{index % nodes}")
        use(place)
        with patched(locks, lock_folders=lambda: [str(node)]):
            built = Path(directory, f"built-{index % nodes}")
            return [right(get(number, built=built, pause=0.02), number) for number in range(keys)]

    wrong = nodes * processes * keys - sum(map(sum, crowd(nodes * processes, work)))
    built = [compiles(Path(directory, f"built-{node}")) for node in range(nodes)]

    def lag():
        """A network file system that hides what others published (negative lookups, cached)."""
        use(place)
        read, start = folders.Folder.read, time.monotonic()

        def late(self, name, size=entries.MAX_ENTRY):
            if time.monotonic() - start < hidden:
                raise FileNotFoundError(name)
            return read(self, name, size)

        with patched(folders.Folder, read=late):
            own = get(0)
            quick = time.monotonic() - start < hidden
            time.sleep(hidden)
            cachekit.forget()
            return quick and right(own, 0) and right(store.load(key(0)), 0)

    lagging, rebuilt = Child(lag).result(hidden + 60), 0
    for skew in (-86400, 86400):
        for number in range(keys):
            os.utime(place / key(number), (time.time() + skew, time.time() + skew))

        def again(skew=skew):
            use(place)
            now = time.time
            with patched(time, time=lambda: now() - skew):
                for number in range(keys):
                    get(number)
                admin.clear(older_than=10 * 86400)
            return store.counts().get("builds", 0) + keys - len(cachekit.kernel_files(place))

        rebuilt += Child(again).result()
    return {
        "nodes": nodes,
        "processes": nodes * processes,
        "most compiles per key and node": max(built) / keys,
        "wrong": wrong,
        "right while lookups are hidden": lagging,
        "rebuilt for a clock a day off": rebuilt,
    }


def _planted():
    """Code under the right name, with the right checksum, that nobody here compiled."""
    entry = toy(1)
    return entries.encode(entries.Entry(entry.key, entry.meta, entry.source, b"planted"))


def _acl(path, uid):
    """An access control list that lets `uid` write."""
    rows = [(1, 7, -1), (2, 7, uid), (4, 0, -1), (0x10, 7, -1), (0x20, 0, -1)]
    packed = struct.pack("<I", 2) + b"".join(struct.pack("<HHi", *row) for row in rows)
    os.setxattr(path, "system.posix_acl_access", packed)


class Layout:
    """A directory tree below `base`, which is root's: owners and modes as a layout says."""

    def __init__(self, base):
        self.base = Path(base)
        self.env = {}

    def folder(self, name, owner=ALICE, mode=0o700):
        path = self.base / name
        path.mkdir()
        os.chown(path, owner, owner)
        path.chmod(mode)
        return path

    def plant(self, folder, owner=MALLORY, mode=0o644):
        path = put(1, folder, mode=mode, data=_planted())
        os.chown(path, owner, owner)
        return path


def _open_directory(at):
    at.plant(cache_dir := at.folder("cache", mode=0o777))
    return cache_dir


def _anothers_directory(at):
    at.plant(cache_dir := at.folder("cache", owner=MALLORY, mode=0o755))
    return cache_dir


def _anothers_kernel(at):
    at.plant(cache_dir := at.folder("cache"))
    return cache_dir


def _open_parent(at):
    at.folder("open", owner=0, mode=0o777)
    at.plant(cache_dir := at.folder("open/cache"), owner=ALICE)
    return cache_dir


def _anothers_grandparent(at):
    at.folder("his", owner=MALLORY, mode=0o755)
    at.folder("his/hers")
    at.plant(cache_dir := at.folder("his/hers/cache"), owner=ALICE)
    return cache_dir


def _access_list(at):
    at.plant(cache_dir := at.folder("cache"))
    _acl(cache_dir, MALLORY)
    return cache_dir


def _linked_kernel(at):
    planted = at.plant(at.folder("his", owner=MALLORY, mode=0o755))
    cache_dir = at.folder("cache")
    os.symlink(planted, cache_dir / key(1))
    return cache_dir


def _hard_linked_kernel(at):
    planted = at.plant(at.folder("his", owner=MALLORY, mode=0o755))
    cache_dir = at.folder("cache")
    os.link(planted, cache_dir / key(1))
    return cache_dir


def _open_kernel(at):
    at.plant(cache_dir := at.folder("cache"), owner=ALICE, mode=0o666)
    return cache_dir


def _linked_directory(at):
    at.plant(his := at.folder("his", owner=MALLORY, mode=0o755))
    os.symlink(his, at.base / "cache")
    return at.base / "cache"


def _group_directory(at):
    at.plant(cache_dir := at.folder("cache", mode=0o770), owner=ALICE)
    return cache_dir


def _open_shared_directory(at):
    at.env["NEURONJIT_SHARED_GROUP"] = "1"
    at.plant(cache_dir := at.folder("cache", mode=0o777), owner=ALICE)
    return cache_dir


def _pipe(at):
    cache_dir = at.folder("cache")
    os.mkfifo(cache_dir / key(1))
    os.chown(cache_dir / key(1), MALLORY, MALLORY)
    return cache_dir


def _anothers_site(at):
    at.plant(site := at.folder("site", owner=MALLORY, mode=0o755))
    at.env["NEURONJIT_CACHE_PATH"] = str(site)
    return at.folder("cache")


def _anothers_cache_home(at):
    """What he made ready in /tmp, where XDG_CACHE_HOME points."""
    home = at.folder("shared-tmp", owner=0, mode=0o1777)
    at.plant(at.folder("shared-tmp/neuronjit", owner=MALLORY, mode=0o755))
    at.env["XDG_CACHE_HOME"] = str(home)


def _anothers_locks(at):
    at.env["locks"] = str(at.folder("locks", owner=MALLORY, mode=0o777))
    return at.folder("cache")


HOSTILE = {
    "directory open to all": _open_directory,
    "directory of another user": _anothers_directory,
    "kernel of another user": _anothers_kernel,
    "parent open to all, not sticky": _open_parent,
    "grandparent of another user": _anothers_grandparent,
    "access list for another user": _access_list,
    "kernel is a symbolic link": _linked_kernel,
    "kernel is a hard link": _hard_linked_kernel,
    "kernel open to all": _open_kernel,
    "directory is a link to another user's": _linked_directory,
    "directory open to its group": _group_directory,
    "open to all, though shared": _open_shared_directory,
    "kernel is another user's pipe": _pipe,
    "site directory of another user": _anothers_site,
    "cache home in a shared /tmp": _anothers_cache_home,
    "locks of another user": _anothers_locks,
}


def p13_layout(base, name):
    """Alice wants kernel 1; Mallory was there. (planted code ran, one warning names it, right)"""
    at = Layout(base)
    cache_dir = HOSTILE[name](at)
    planted = at.env.pop("locks", None)

    def prepare():
        use(cache_dir or "unused")
        os.environ.update(at.env)
        if cache_dir is None:
            del os.environ["NEURONJIT_CACHE_DIR"]

    def work():
        places = locks.lock_folders() if planted is None else [planted]
        with patched(locks, lock_folders=lambda: places):
            loaded = store.load(key(1))
            built = get(1)
            found = store.find(cachekit.request(1), "cpu", "toy")
        ran = any(e is not None and e.binary == b"planted" for e in (loaded, built, found))
        return ran, right(built, 1)

    found = Child(work, uid=ALICE, setup=prepare).finish()
    ran, good = found["value"]
    texts = found["warnings"]
    named = len(texts) == 1 and str(base) in texts[0] and "owner" in texts[0] and "mode" in texts[0]
    return ran, named, good, texts


def p13_swaps(directory, tries):
    """A name that is now a sound kernel, now a link to planted code, all the time."""
    place, his = Path(directory, "cache"), Path(directory, "his")
    place.mkdir(mode=0o700)
    his.mkdir()
    use(place)
    planted = put(1, his, data=_planted(), mode=0o644)
    os.chown(planted, MALLORY, MALLORY)
    sound = put(2, directory, data=entries.encode(toy(1)))

    def swap():
        for number in itertools.count():
            make, source = ((os.link, sound), (os.symlink, planted), (os.link, planted))[number % 3]
            make(source, place / "next")
            os.replace(place / "next", place / key(1))

    swapper, end = Child(swap), time.monotonic() + 60
    ran = loaded = tried = 0
    try:
        with cachekit.heard():
            while tried < tries or (not loaded and time.monotonic() < end):
                entry = store.load(key(1))
                ran += entry is not None and entry.binary == b"planted"
                loaded += entry is not None
                tried += 1
    finally:
        swapper.kill()
        swapper.wait_status()
    return {"tries": tried, "loaded": loaded, "planted code loaded": ran}
