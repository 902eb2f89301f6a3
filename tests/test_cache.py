"""The kernel cache piece by piece; its promises as a whole are in test_cache_promises.py."""

import ast
import fcntl
import os
import subprocess
import sys
import time
from pathlib import Path

import cachekit
import pytest
from cachekit import (
    ALICE,
    BARE,
    MALLORY,
    ROOT,
    Child,
    get,
    heard,
    key,
    needs_root,
    patched,
    put,
    request,
    right,
    toy,
    use,
)

from neuronjit import settings
from neuronjit.cache import admin, bundles, entries, folders, locks, store


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A cache directory that is not there yet."""
    for name in ("NEURONJIT_CACHE_DIR", "NEURONJIT_CACHE_PATH", "NEURONJIT_CACHE_SIZE"):
        monkeypatch.setenv(name, "")
    yield use(tmp_path / "cache")
    cachekit.forget()


def test_what_is_stored_is_what_is_loaded(place):
    entry = toy(1)
    assert store.load(entry.key) is None
    assert not place.exists()  # looking makes no directories
    assert store.load_or_make(entry.key, lambda: entry) is entry
    assert store.load(entry.key) == entry
    assert store.load_or_make(entry.key, lambda: pytest.fail("built again")) == entry
    assert store.counts() == {
        "misses": 2,
        "hits": 2,
        "builds": 1,
        "bytes read": 2 * (place / entry.key).stat().st_size,
        "bytes written": (place / entry.key).stat().st_size,
    }


def test_one_private_file_a_kernel_named_by_its_key(place):
    for number in range(3):
        get(number)
    assert sorted(os.listdir(place)) == sorted(key(number) for number in range(3))
    assert place.stat().st_mode & 0o777 == 0o700
    assert {path.stat().st_mode & 0o777 for path in place.iterdir()} == {0o600}


def test_names_from_outside_never_become_paths(place):
    entry = toy(1)
    names = ["../../x", "/etc/passwd", "a\nb", "x" * 300, "CON", "\x1b[2J", "\0", "ë", "🙂"]
    for name in names:
        spec = entries.Entry(entry.key, {**entry.meta, "spec": name, "model": name}, name, b"x")
        assert entries.decode(entries.encode(spec), entry.key) == spec
        with pytest.raises(ValueError, match="a key has 64 hex digits"):
            store.load(name)
    with pytest.raises(ValueError, match="a key has 64 hex digits"):
        store.load(entry.key.upper())


def test_key_is_the_same_in_every_process():
    code = (
        BARE + "import os; os.chdir('/'); from cachekit import key; print(*map(key, range(200)))\n"
    )
    found = {
        subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "PYTHONHASHSEED": str(seed)},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in (0, 1, 2)
    }
    assert found == {" ".join(key(number) for number in range(200)) + "\n"}
    assert len({key(number) for number in range(200)}) == 200


def test_key_follows_every_input():
    fingerprint = {
        "arch": "sm_90",
        "compiler": "12.9",
        "flags": "--fmad=false",
        "abi": "glibc 2.36",
    }
    keys = {store.make_key(request(1), fingerprint), store.make_key(request(2), fingerprint)}
    for name in fingerprint:
        keys.add(store.make_key(request(1), {**fingerprint, name: fingerprint[name] + "a"}))
        keys.add(store.make_key(request(1), {k: v for k, v in fingerprint.items() if k != name}))
    keys.add(store.make_key(request(1), {**fingerprint, "more": ""}))
    with patched(entries, SCHEMA=entries.SCHEMA + 1):
        keys.add(store.make_key(request(1), fingerprint))
    assert len(keys) == 2 + 2 * len(fingerprint) + 2
    turned = dict(reversed(fingerprint.items()))
    assert store.make_key(request(1), turned) == store.make_key(request(1), fingerprint)


def test_a_failed_build_is_never_remembered(place):
    class Broken(RuntimeError):
        pass

    def fail():
        raise Broken("no space left on device")

    for _ in range(3):
        with pytest.raises(Broken):
            store.load_or_make(key(1), fail)
        assert not place.exists() or os.listdir(place) == []
    assert right(get(1), 1)
    assert right(store.load(key(1)), 1)


def test_an_entry_that_could_not_be_verified_is_refused(place):
    entry = toy(1)
    without = entries.Entry(entry.key, {"request": request(1)}, "", b"")
    for wrong in (toy(2), without):
        with pytest.raises(ValueError, match=r"fingerprint|built for"):
            store.load_or_make(key(1), lambda wrong=wrong: wrong)
    assert os.listdir(place) == []


def test_what_is_too_large_stays_in_memory(place, monkeypatch):
    monkeypatch.setenv("NEURONJIT_CACHE_SIZE", "2K")
    with heard() as texts:
        assert right(get(1, size=5000), 1)
        assert right(get(2, size=5000), 2)
    assert len(texts) == 1 and "larger than all may be (2048)" in texts[0]
    assert right(store.load(key(1)), 1)  # from memory


def test_metadata_that_no_list_could_read_is_not_written(place):
    entry = toy(1, note="x" * entries.HEAD)
    with heard() as texts:
        assert store.load_or_make(key(1), lambda: entry) is entry
    assert len(texts) == 1 and "too large" in texts[0]
    assert os.listdir(place) == []


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("", 1 << 30),
        ("123", 123),
        ("64K", 64 << 10),
        ("200M", 200 << 20),
        ("2g", 2 << 30),
        ("1GiB", 1 << 30),
        (" 5 MB ".replace(" ", ""), 5 << 20),
        ("0", 0),
    ],
)
def test_size_cap(monkeypatch, text, size):
    monkeypatch.setenv("NEURONJIT_CACHE_SIZE", text)
    assert store.size_cap() == size


@pytest.mark.parametrize("text", ["many", "-1", "1.5G", "1e9", "10PB", "٣", "9" * 40])
def test_a_size_that_is_none_costs_one_warning(place, monkeypatch, text):
    monkeypatch.setenv("NEURONJIT_CACHE_SIZE", text)
    with heard() as texts:
        assert [store.size_cap() for _ in range(3)] == [1 << 30] * 3
    assert len(texts) == 1 and repr(text) in texts[0]


def test_a_cache_of_no_size_writes_nothing(place, monkeypatch):
    monkeypatch.setenv("NEURONJIT_CACHE_SIZE", "0")
    with heard() as texts:
        assert right(get(1), 1)
    assert not place.exists() and texts == []


def test_the_least_recently_used_go_first(place, monkeypatch):
    for number in range(10):
        get(number)
        os.utime(place / key(number), (1000 + number, 1000 + number))
    size = (place / key(0)).stat().st_size
    cachekit.forget()
    get(0)  # a hit: now the most recent
    monkeypatch.setenv("NEURONJIT_CACHE_SIZE", str(8 * size))
    get(10)
    left = {number for number in range(11) if (place / key(number)).exists()}
    assert {0, 10} <= left
    assert left == {0, *range(11 - len(left) + 1, 11)}
    assert len(left) <= 8


def test_a_hit_is_noted_at_most_once_an_hour_and_only_on_files_of_ours(place):
    get(1)
    path = place / key(1)
    for age, noted in ((60, False), (7200, True), (-7200, True)):
        os.utime(path, (time.time() - age,) * 2)
        before = path.stat().st_mtime_ns
        store.load(key(1))
        assert (path.stat().st_mtime_ns != before) is noted, age
    if os.geteuid() == 0:
        store.load(key(1))
        os.chown(path, ALICE, ALICE)
        with patched(os, geteuid=lambda: ALICE, getuid=lambda: ALICE):
            os.chown(path, 0, 0)  # somebody else's kernel that may be read, as at a site
            os.utime(path, (1000, 1000))
            with folders.opened("/") as folder:
                folder.touch(str(path), path.stat())
        assert path.stat().st_mtime == 1000


def test_temporary_files_of_the_dead_are_swept_and_no_others(place):
    get(0)
    old, young, strange = place / ("tmp." + "0" * 32), place / ("tmp." + "1" * 32), place / "notes"
    for path in (old, young, strange):
        path.write_bytes(b"half a kernel")
    os.utime(old, (1000, 1000))
    os.utime(strange, (1000, 1000))
    cachekit.forget()
    get(1)
    assert not old.exists() and young.exists() and strange.exists()


def test_junk_in_the_directory_harms_nothing(place, monkeypatch):
    get(1)
    (place / "junk").mkdir()
    (place / "junk" / "more").write_text("junk")
    (place / "0123").write_text("junk")
    (place / key(2)).mkdir()
    (place / key(3)).write_text("junk")
    os.symlink("/nowhere", place / key(4))
    os.mkfifo(place / key(5))
    with heard():
        for number in (1, 2, 3, 4, 5):
            assert right(get(number), number)
            assert right(store.load(key(number)), number)
        found = {item.key: item for item in admin.entries()}
        assert {number for number in range(6) if key(number) in found} == {1, 2, 3, 4, 5}
        assert not any(item.problem for item in found.values())
        monkeypatch.setenv("NEURONJIT_CACHE_SIZE", "9000")
        cachekit.forget()
        assert right(get(6), 6)
        assert (place / key(6)).exists()
        assert admin.stats()["bytes"] <= 9000
    assert (place / "junk" / "more").exists()


def test_an_interrupt_leaves_nothing_behind(place):
    get(1)
    with (
        patched(os, fsync=lambda fd: (_ for _ in ()).throw(KeyboardInterrupt)),
        pytest.raises(KeyboardInterrupt),
    ):
        get(2)
    assert os.listdir(place) == [key(1)]
    assert right(get(2), 2)


def test_a_directory_that_vanishes_is_made_again(place):
    def build():
        place.rmdir()
        return toy(1)

    with heard() as texts:
        store.load_or_make(key(1), build)
    assert texts == [] and right(store.load(key(1)), 1)


def test_site_directories_are_read_after_ones_own(tmp_path, place):
    site = tmp_path / "site"
    site.mkdir()
    put(1, site)
    put(2, site)
    use(place, tmp_path / "nowhere", site)
    with heard() as texts:
        assert right(get(1, built=tmp_path / "built"), 1)
        assert right(get(3), 3)
    assert not (tmp_path / "built").exists() and texts == []
    assert os.listdir(place) == [key(3)] and key(3) not in os.listdir(site)
    (site / key(1)).write_bytes(b"damaged")
    with heard() as texts:
        assert right(get(1), 1)
    assert (place / key(1)).exists() and len(texts) == 1


def test_find_takes_any_compiler_but_the_very_request_and_arch(tmp_path, place):
    for number, (arch, compiler) in enumerate(
        [("v3", "g++ 12"), ("v4", "g++ 12"), ("v3", "clang")]
    ):
        fingerprint = {"compiler": compiler, "arch": arch}
        meta = {"request": request(7), "fingerprint": fingerprint, "target": "cpu", "arch": arch}
        name = store.make_key(request(7), fingerprint)
        entry = entries.Entry(name, meta, "", bytes([number]))
        store.load_or_make(name, lambda entry=entry: entry)
    assert store.find(request(7), "cpu", "v4").binary == b"\1"
    assert store.find(request(7), "cpu", "v3").binary in (b"\0", b"\2")
    assert store.find(request(7), "cuda", "v3") is None
    assert store.find(request(8), "cpu", "v3") is None
    for path in place.iterdir():
        if b'"v4"' in path.read_bytes():
            path.write_bytes(path.read_bytes()[:-1])
    with heard() as texts:
        assert store.find(request(7), "cpu", "v4") is None  # what is found is verified
    assert len(texts) == 1


def test_find_reads_the_metadata_of_a_thousand_kernels_once(place):
    place.mkdir(mode=0o700)
    for number in range(1000):
        put(number, place)
    reads, read = [], folders.Folder.read

    def counted(self, name, size=entries.MAX_ENTRY):
        reads.append(name)
        return read(self, name, size)

    start = time.perf_counter()
    assert store.find(request("none"), "cpu", "toy") is None
    assert time.perf_counter() - start < 0.5  # about 0.02 s where nothing else runs
    with patched(folders.Folder, read=counted):
        assert right(store.find(request(500), "cpu", "toy"), 500)
        put(1000, place)
        assert right(store.find(request(1000), "cpu", "toy"), 1000)
    assert reads == [key(500), key(1000), key(1000)]


def test_kernels_that_stay_in_memory_are_found_too(place, monkeypatch):
    monkeypatch.setenv("NEURONJIT_CACHE_SIZE", "0")
    get(1)
    assert right(store.find(request(1), "cpu", "toy"), 1)


def test_another_schema_is_neither_loaded_nor_called_damaged(place):
    get(1)
    data = bytearray((place / key(1)).read_bytes())
    data[8:12] = (entries.SCHEMA + 1).to_bytes(4, "little")
    put(1, place, data=entries.hashlib.sha256(data[:-32]).digest().join([data[:-32], b""]))
    assert admin.verify() == (1, [])
    with heard():
        assert store.load(key(1)) is None
    (listed,) = admin.entries()
    assert listed.stale("any")
    assert admin.clear(stale_for="any") == (1, len(data))


def test_clear_by_age_model_and_version(place):
    def fill():
        for number, (model, version) in enumerate([("lif", "1"), ("lif", "2"), ("qif", "2")]):
            entry = toy(number, model=model, versions={"neuronjit": version})
            store.load_or_make(entry.key, lambda entry=entry: entry)
        os.utime(place / key(0), (1000, 1000))

    def left():
        return {number for number in range(3) if (place / key(number)).exists()}

    for arguments, expected in (
        (dict(older_than=3600.0), {1, 2}),
        (dict(model="lif"), {2}),
        (dict(stale_for="2"), {1, 2}),
        (dict(model="qif", older_than=3600.0), {0, 1, 2}),
        ({}, set()),
    ):
        fill()
        removed, size = admin.clear(**arguments)
        assert left() == expected, arguments
        assert removed == 3 - len(expected) and (size > 0) == (removed > 0)


def test_stats_and_directories_tell_what_is_there(place, tmp_path):
    site = tmp_path / "site"
    use(place, site)
    user, other, *locks = admin.directories()
    assert (user.role, user.trusted, user.why) == ("user", False, "is made when it is needed")
    assert (other.role, other.why, other.owner) == ("site", "is not there", None)
    assert {directory.role for directory in locks} <= {"locks"}
    get(1)
    (place / key(1)).write_bytes(b"damaged")
    with heard():
        get(1)
    get(2)
    site.mkdir()
    site.chmod(0o777)
    user, other, *_ = admin.directories()
    assert (user.trusted, user.why, user.entries, user.writable) == (True, "", 2, True)
    assert (user.owner, user.mode) == (os.geteuid(), 0o700)
    assert user.bytes == sum(path.stat().st_size for path in place.iterdir())
    assert not other.trusted and "0777" in other.why and other.mode == 0o777
    with heard():
        stats = admin.stats()
    assert stats["kernels"] == 2 and stats["rebuilt"] == {"damaged": 1}
    assert stats["targets"] == {"cpu": 2} and stats["models"] == {"lif": 2}
    assert stats["this process"]["rebuilds: damaged"] == 1


def test_verify_reports_a_directory_that_it_may_not_trust(place):
    get(1)
    place.chmod(0o777)
    checked, (finding,) = admin.verify(fix=True)
    assert checked == 0 and finding.key == "" and "0777" in finding.why and not finding.removed
    assert (place / key(1)).exists()


@needs_root
def test_verify_fixes_only_what_it_may(place):
    def work():
        checked, found = admin.verify(fix=True)
        return checked, [(finding.key, finding.removed) for finding in found]

    with cachekit.for_all_users() as site:
        use(site)
        for number in range(3):
            put(number, site, mode=0o644)
        (site / key(1)).write_bytes(b"damaged")
        assert Child(work, uid=ALICE).result() == [3, [[key(1), False]]]
        assert admin.verify(fix=True)[1][0].removed
        assert sorted(os.listdir(site)) == sorted([key(0), key(2)])


@needs_root
def test_a_group_may_share_a_directory_if_told_so(place):
    group = 54300

    def work(uid, shared):
        os.setresgid(group, group, group)
        os.setresuid(uid, uid, uid)
        os.environ["NEURONJIT_SHARED_GROUP"] = shared
        return right(get(1), 1), store.counts().get("builds", 0)

    with cachekit.for_all_users() as base:
        shared = use(base / "cache")
        shared.mkdir()
        os.chown(shared, ALICE, group)
        shared.chmod(0o2770)
        alone = Child(work, ALICE, "").finish()
        assert alone["value"] == [True, 1] and "its group" in alone["warnings"][0]
        assert Child(work, ALICE, "1").finish() == {"value": [True, 1], "warnings": []}
        assert Child(work, MALLORY, "1").finish() == {"value": [True, 0], "warnings": []}
        (shared / key(1)).chmod(0o666)
        found = Child(work, MALLORY, "1").finish()
        assert found["value"] == [True, 1] and "0666" in found["warnings"][0]


@needs_root
def test_what_was_opened_is_judged_and_not_its_name_alone(place, tmp_path):
    get(1)
    sound = (place / key(1)).stat()
    (place / key(1)).unlink()
    os.chown(put(1, tmp_path), MALLORY, MALLORY)
    os.link(tmp_path / key(1), place / key(1))  # swapped in after its name was looked at
    with patched(folders.Folder, stat=lambda self, name: sound), heard() as texts:
        assert store.load(key(1)) is None
    assert f"owner {MALLORY}" in texts[0]


@needs_root
def test_variables_of_another_user_are_not_obeyed(place):
    def work():
        os.setresuid(ALICE, 0, 0)
        return [settings.cache_dir(), settings.trusts_groups()]

    os.environ["NEURONJIT_SHARED_GROUP"] = "1"
    try:
        assert (settings.cache_dir(), settings.trusts_groups()) == (str(place), True)
        assert Child(work).result() == ["", False]
    finally:
        del os.environ["NEURONJIT_SHARED_GROUP"]


def test_without_a_place_for_locks_all_is_right(place):
    def work(index):
        use(place)
        with patched(locks, lock_folders=lambda: ["/proc/nowhere", "/nowhere/at/all"]):
            return right(get(1), 1)

    assert cachekit.crowd(4, work) == [True] * 4


def test_a_path_from_a_directory_that_is_gone_costs_a_warning(place, tmp_path):
    def work():
        gone = tmp_path / "gone"
        gone.mkdir()
        os.chdir(gone)
        gone.rmdir()
        use("kernels", "site")
        return right(get(1), 1)

    found = Child(work).finish()
    assert found["value"] and "finds no directory 'kernels'" in found["warnings"][0]


def test_a_home_is_written_as_a_tilde(place, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    use("~/kernels", "~/site")
    assert folders.search_path() == [f"{tmp_path}/kernels", f"{tmp_path}/site"]


def test_the_lock_excludes(place, tmp_path):
    inside = tmp_path / "inside"

    def work(index):
        for _ in range(25):
            with locks.key_lock(str(place), key(1)):
                with open(inside, "x"):
                    time.sleep(0.0005)
                inside.unlink()
        return True

    assert cachekit.crowd(8, work) == [True] * 8


def test_a_lock_that_its_holder_removed_meanwhile_is_no_lock(place):
    """The holder unlinks and unlocks between our opening and our locking."""
    name = locks.hashlib.sha256(f"{place}\n{key(1)}".encode()).hexdigest()
    path, lockf = Path(locks.lock_folders()[0], name), fcntl.lockf
    removed = []

    def late(fd, flags):
        if not removed:
            removed.append(path)
            path.unlink()
        lockf(fd, flags)

    with patched(fcntl, lockf=late), locks.key_lock(str(place), key(1)):
        assert removed and path.exists()


def test_what_another_thread_held_during_a_fork_is_free_in_the_child(place):
    get(1)
    with store._counting, locks.key_lock(str(place), key(2), processes=False):
        assert Child(lambda: [right(get(number), number) for number in (1, 2)]).result(10)


def test_a_sticky_directory_is_a_safe_parent_but_no_cache(place):
    place.mkdir(mode=0o700)
    place.chmod(0o1777)
    with pytest.raises(folders.Untrusted, match="1777"), folders.opened(str(place)):
        pass
    with folders.opened(str(place / "below"), create=0o700) as folder:
        assert folder.writable()


def test_a_lock_leaves_no_file_and_no_descriptor(place):
    before = len(os.listdir("/dev/fd"))
    for number in range(20):
        get(number)
    for folder in locks.lock_folders():
        name = locks.hashlib.sha256(f"{place}\n{key(1)}".encode()).hexdigest()
        assert not os.path.exists(os.path.join(folder, name))
    assert len(os.listdir("/dev/fd")) == before


def test_a_child_that_leaves_a_build_does_not_unlock_its_parent(place, tmp_path):
    def work():
        def build():
            pid = os.fork()
            if pid == 0:
                raise SystemExit(0)
            os.waitpid(pid, 0)
            other = Child(get_soon)
            with pytest.raises(cachekit.Died):
                other.result(0.3)  # it waits for us
            return toy(1)

        parent = os.getpid()
        try:
            store.load_or_make(key(1), build)
        except SystemExit:
            os._exit(0)
        return os.getpid() == parent

    def get_soon():
        with patched(locks, TIMEOUT_S=20.0):
            return right(get(1), 1)

    assert Child(work).result() is True


def test_import_touches_no_disk():
    code = """
import os, sys
def refuse(event, args):
    flags = args[2] if event == "open" and isinstance(args[2], int) else 0
    if flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT) or event in ("os.mkdir", "subprocess.Popen"):
        raise SystemExit(f"{event} {args}")
sys.addaudithook(refuse)
import neuronjit.cache.store, neuronjit.cache.bundles, neuronjit.cache.admin
print("platformdirs" in sys.modules)
"""
    done = subprocess.run(
        [sys.executable, "-B", "-c", BARE + code], capture_output=True, text=True, check=False
    )
    assert (done.stdout, done.stderr, done.returncode) == ("False\n", "", 0)


def test_nothing_is_unpickled_or_evaluated():
    for path in sorted(ROOT.joinpath("neuronjit").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                names = [node.module or ""]
            elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                names = [node.func.id] if node.func.id in ("eval", "exec") else []
            bad = {"pickle", "marshal", "shelve", "dill", "eval", "exec"} & set(names)
            assert not bad, f"{path}:{node.lineno}: {bad}"


def test_an_entry_tells_nothing_of_who_made_it(place):
    import torch

    import neuronjit as nj
    from neuronjit.kernels import targets

    if targets.by_name("cpu").why_unavailable():
        pytest.skip("needs a C++ compiler")
    model = nj.NeuronModel("stranger", "h = v + x * 0.25", state={"v": 0.0}, params={})
    nj.multistep(model, torch.ones(3, 5), surrogate=nj.surrogates.ATan())
    files = list(place.iterdir())
    assert files
    private = [os.path.expanduser("~") + "/", os.getcwd(), str(place), os.uname().nodename]
    for path in files:
        entry = entries.decode(path.read_bytes(), path.name)
        for text in (str(entry.meta), entry.source, entry.binary.decode("latin-1")):
            assert [word for word in private if len(word) > 3 and word in text] == []


def test_the_modules_know_no_compiler_and_no_tensor():
    for module in (admin, bundles, entries, folders, locks, store):
        imported = {
            alias.name.split(".")[0]
            for node in ast.walk(ast.parse(Path(module.__file__).read_text()))
            if isinstance(node, ast.Import)
            for alias in node.names
        }
        assert imported <= set(sys.stdlib_module_names) | {"platformdirs"}
