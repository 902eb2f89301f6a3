"""Bundles: exact, refused unless trusted, and unable to do harm."""

import itertools
import os
import signal
import socket
import stat
import tarfile
import time

import cachekit
import pytest
from cachekit import ALICE, Child, heard, key, needs_root, put, right, use
from promises_bundle import bombs, fuzz, p14_bundles, pack

from neuronjit.cache import bundles, entries, store
from neuronjit.errors import BundleError


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A directory with three kernels, and one that is damaged."""
    for name in ("NEURONJIT_CACHE_DIR", "NEURONJIT_CACHE_PATH"):
        monkeypatch.setenv(name, "")
    place = use(tmp_path / "cache")
    place.mkdir(mode=0o700)
    for number in range(3):
        put(number, place)
    put(3, place, data=b"damaged")
    yield place
    cachekit.forget()


def test_p14_bundles(tmp_path, monkeypatch):
    monkeypatch.setenv("NEURONJIT_CACHE_DIR", "")
    figures = p14_bundles(tmp_path)
    assert figures["restored byte for byte"] == figures["kernels"]
    assert figures["refused"] == figures["archives"] >= 20 and figures["escaped"] == 0


def test_malformed_kernels_neither_crash_nor_pass_for_another():
    outcomes = fuzz(5000)
    assert outcomes["wrong"] == 0 < outcomes["refused"]


def test_the_same_kernels_give_the_same_bundle_that_tar_can_list(place, tmp_path):
    one, two = (bundles.export_bundle(str(tmp_path / name)) for name in ("one", "two"))
    assert (one.kernels, one.skipped) == (3, 1) and one.sha256 == two.sha256
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()
    with tarfile.open(tmp_path / "one") as archive:
        assert archive.getnames() == sorted(key(number) for number in range(3))
    assert bundles.export_bundle(str(tmp_path / "one"), keys=[key(1)]).kernels == 1
    assert sorted(os.listdir(tmp_path)) == ["cache", "one", "two"]


def test_an_export_that_fails_leaves_nothing(place, tmp_path):
    with pytest.raises(FileNotFoundError):
        bundles.export_bundle(str(tmp_path / "nowhere" / "kernels.njc"))
    with pytest.raises(OSError, match="new file in the folder") as caught:
        bundles.export_bundle("/proc/kernels.njc")
    assert caught.value.filename == "/proc"
    assert os.listdir(tmp_path) == ["cache"]


def test_an_import_needs_trust_or_the_digest(place, tmp_path):
    path = str(tmp_path / "kernels.njc")
    carried = bundles.export_bundle(path)
    use(tmp_path / "other")
    with pytest.raises(BundleError, match=f"holds code.*{carried.sha256}"):
        bundles.import_bundle(path)
    with pytest.raises(BundleError, match=f"has SHA-256 {carried.sha256}"):
        bundles.import_bundle(path, trust=True, sha256="0" * 64)
    assert not (tmp_path / "other").exists()
    done = bundles.import_bundle(path, sha256=carried.sha256.upper())
    assert (done.path, done.kernels, done.skipped) == (str(tmp_path / "other"), 3, 0)
    assert all(right(store.load(key(number)), number) for number in range(3))
    assert (tmp_path / "other").stat().st_mode & 0o777 == 0o700


def test_an_altered_bundle_is_refused(place, tmp_path):
    path = tmp_path / "kernels.njc"
    carried = bundles.export_bundle(str(path))
    data = bytearray(path.read_bytes())
    data[2000] ^= 1
    path.write_bytes(data)
    with pytest.raises(BundleError, match="checksum"):
        bundles.import_bundle(str(path), trust=True)
    path.write_bytes(pack((key(5), entries.encode(cachekit.toy(5)))))  # sound, but another
    with pytest.raises(BundleError, match="SHA-256"):
        bundles.import_bundle(str(path), sha256=carried.sha256)


def test_a_bundle_that_changes_meanwhile_is_refused(place, tmp_path):
    path = tmp_path / "kernels.njc"
    bundles.export_bundle(str(path))
    survey = bundles._survey

    def then_change(file):
        found = survey(file)
        data = bytearray(path.read_bytes())
        data[2000] ^= 1
        with open(path, "r+b") as other:  # in place: the open file sees it
            other.write(data)
        return found

    use(tmp_path / "other")
    with (
        cachekit.patched(bundles, _survey=then_change),
        pytest.raises(BundleError, match="changed while"),
    ):
        bundles.import_bundle(str(path), trust=True)
    assert not (tmp_path / "other").exists()


def test_what_is_there_is_kept_and_what_is_damaged_replaced(place, tmp_path):
    path = str(tmp_path / "kernels.njc")
    bundles.export_bundle(path)
    (place / key(1)).write_bytes(b"damaged")
    before = (place / key(0)).stat().st_ino
    done = bundles.import_bundle(path, trust=True)
    assert (done.kernels, done.skipped) == (1, 2)
    assert (place / key(0)).stat().st_ino == before
    assert right(store.load(key(1)), 1)


@needs_root
def test_a_site_directory_is_for_all_users_to_read(place, tmp_path):
    path = str(tmp_path / "kernels.njc")
    bundles.export_bundle(path)
    with cachekit.for_all_users() as base:
        site = base / "opt" / "kernels"
        before = os.umask(0o077)
        try:
            bundles.import_bundle(path, trust=True, to=str(site))
        finally:
            os.umask(before)
        assert {stat.S_IMODE(item.stat().st_mode) for item in site.iterdir()} == {0o644}

        def work():
            use(base / "none", site)
            return [right(store.load(key(number)), number) for number in range(3)]

        assert Child(work, uid=ALICE).finish() == {"value": [True] * 3, "warnings": []}


def test_an_unsafe_destination_is_named(place, tmp_path):
    path = str(tmp_path / "kernels.njc")
    bundles.export_bundle(path)
    into = tmp_path / "open"
    into.mkdir()
    into.chmod(0o777)
    with pytest.raises(BundleError, match=r"open' can be written by everybody \(owner .*0777"):
        bundles.import_bundle(path, trust=True, to=str(into))
    assert os.listdir(into) == []


def test_without_a_home_it_asks_where_to(place, tmp_path, monkeypatch):
    path = str(tmp_path / "kernels.njc")
    bundles.export_bundle(path)
    monkeypatch.setattr(bundles, "user_dir", lambda: "")
    with pytest.raises(BundleError, match="say where to"), heard():
        bundles.import_bundle(path, trust=True)


def test_a_pipe_is_no_bundle(tmp_path):
    with pytest.raises(BundleError, match="no regular file"):
        bundles.import_bundle("/dev/null", trust=True)


@pytest.fixture
def large(place, tmp_path):
    """A bundle of three kernels, 150 KB, and a user's directory with three others, as large."""
    for number in range(3):
        put(number, place, size=50_000)
    path = str(tmp_path / "kernels.njc")
    bundles.export_bundle(path)
    other = use(tmp_path / "other")
    other.mkdir(mode=0o700)
    for number in range(10, 13):
        os.utime(put(number, other, size=50_000), (1000, 1000))
    return path, other


@pytest.mark.parametrize("cap", ["0", "100K", "200K", "1G"])
def test_an_import_evicts_nothing_whatever_the_cap(large, monkeypatch, cap):
    path, other = large
    monkeypatch.setenv("NEURONJIT_CACHE_SIZE", cap)
    before, own = sorted(os.listdir(other)), {key(number) for number in range(3)}
    with heard() as texts:
        if cap == "0":
            with pytest.raises(BundleError, match=r"NEURONJIT_CACHE_SIZE=0 .*--to"):
                bundles.import_bundle(path, trust=True)
            assert sorted(os.listdir(other)) == before
        else:
            assert bundles.import_bundle(path, trust=True).kernels == 3
            assert set(os.listdir(other)) == own.union(before)
    size = sum(item.stat().st_size for item in other.iterdir())
    limit = store.size_cap()
    if cap in ("100K", "200K"):
        (text,) = texts
        assert f"{size} bytes" in text and f"NEURONJIT_CACHE_SIZE allows {limit}" in text
        cachekit.get(20)  # an ordinary kernel obeys the cap, in this process too
        assert sum(item.stat().st_size for item in other.iterdir()) <= limit
    else:
        assert texts == []


@pytest.mark.parametrize("cap", ["0", "100K"])
def test_a_site_directory_has_no_cap(large, tmp_path, monkeypatch, cap):
    path, _ = large
    monkeypatch.setenv("NEURONJIT_CACHE_SIZE", cap)
    with heard() as texts:
        assert bundles.import_bundle(path, trust=True, to=str(tmp_path / "site")).kernels == 3
    assert len(os.listdir(tmp_path / "site")) == 3 and texts == []


def test_an_import_sweeps_what_a_killed_one_left(large, tmp_path):
    path, _ = large
    site = tmp_path / "site"
    site.mkdir()
    old = site / ("tmp." + "0" * 32)
    old.write_bytes(b"half")
    os.utime(old, (1000, 1000))
    bundles.import_bundle(path, trust=True, to=str(site))
    assert not old.exists() and len(os.listdir(site)) == 3


def _device(path):
    if os.geteuid():
        pytest.skip("needs root, to make a device")
    os.mknod(path, 0o666 | stat.S_IFCHR, os.makedev(1, 3))


def _socket(path):
    with socket.socket(socket.AF_UNIX) as made:
        made.bind(os.path.relpath(path))  # a socket's name may have 100 letters


def _link(path):
    path.with_name("linked").write_bytes(b"dear")
    path.symlink_to("linked")


TAKEN = {
    "device": _device,
    "pipe": os.mkfifo,
    "socket": _socket,
    "directory": os.mkdir,
    "link": _link,
    "link to nothing": lambda path: path.symlink_to("nothing"),
    "link to a device": lambda path: path.symlink_to("/dev/null"),
}


@pytest.mark.parametrize("taken", TAKEN)
def test_an_export_replaces_nothing_but_a_file(place, tmp_path, taken):
    path = tmp_path / "kernels.njc"
    TAKEN[taken](path)
    before, names = path.lstat(), sorted(os.listdir(tmp_path))
    with pytest.raises(BundleError, match=r"kernels\.njc' is .*name"):
        bundles.export_bundle(str(path))
    after = path.lstat()
    assert (after.st_ino, after.st_mode, after.st_rdev) == (
        before.st_ino,
        before.st_mode,
        before.st_rdev,
    )
    assert sorted(os.listdir(tmp_path)) == names
    if taken == "link":
        assert (tmp_path / "linked").read_bytes() == b"dear"


@needs_root
def test_an_export_says_which_folder_it_may_not_write(place, tmp_path):
    with cachekit.for_all_users() as base:
        kernels = base / "cache"
        os.rename(place, kernels)
        os.chown(kernels, ALICE, ALICE)
        for item in kernels.iterdir():
            os.chown(item, ALICE, ALICE)

        def work():
            use(kernels)
            with pytest.raises(PermissionError) as caught:
                bundles.export_bundle(str(base / "kernels.njc"))
            return str(caught.value)

        found = Child(work, uid=ALICE).result()
        assert f"new file in the folder: Permission denied: '{base}'" in found
        assert os.listdir(base) == ["cache"]


def test_what_a_killed_export_left_goes_with_the_next_one(place, tmp_path):
    path = tmp_path / "kernels.njc"

    def die(*_):
        os.kill(os.getpid(), signal.SIGKILL)

    def work():
        with cachekit.patched(os, replace=die):
            bundles.export_bundle(str(path))

    for _ in range(2):
        assert os.WIFSIGNALED(Child(work).wait_status())
    old, young = tmp_path.glob("kernels.njc.*.unfinished")
    stranger = tmp_path / "kernels.njc.notes.unfinished"
    stranger.write_text("mine")
    for item in (old, stranger):
        os.utime(item, (time.time() - 3600,) * 2)
    bundles.export_bundle(str(path))
    assert sorted(tmp_path.glob("*.unfinished")) == sorted([young, stranger])


def test_nothing_is_unpacked_before_somebody_trusts_it(place, tmp_path, monkeypatch):
    path = tmp_path / "bombs.njc"
    path.write_bytes(pack(*bombs(300)))
    unpacked = []

    def count(*_):
        unpacked.append(1)
        raise MemoryError

    monkeypatch.setattr(entries.zlib, "decompressobj", count)
    for arguments, words in (({}, "holds code"), ({"sha256": "0" * 64, "trust": True}, "SHA-256")):
        with pytest.raises(BundleError, match=words):
            bundles.import_bundle(str(path), **arguments)
    assert unpacked == []
    with pytest.raises(MemoryError):
        bundles.import_bundle(str(path), trust=True)
    assert unpacked == [1]


def test_a_bundle_that_changes_after_it_was_checked_is_refused(place, tmp_path):
    path = tmp_path / "kernels.njc"
    bundles.export_bundle(str(path))
    decode, data = bundles.decode, bytearray(path.read_bytes())
    data[2000] ^= 1
    calls = itertools.count(1)

    def then_change(*arguments):
        if next(calls) == 3:  # the last one
            with open(path, "r+b") as other:
                other.write(data)
        return decode(*arguments)

    use(tmp_path / "other")
    with (
        cachekit.patched(bundles, decode=then_change),
        pytest.raises(BundleError, match="changed while"),
    ):
        bundles.import_bundle(str(path), trust=True)
    assert os.listdir(tmp_path / "other") == []
