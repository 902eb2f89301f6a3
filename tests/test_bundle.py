"""Bundles: exact, refused unless trusted, and unable to do harm."""

import os
import stat
import tarfile

import cachekit
import pytest
from cachekit import ALICE, Child, heard, key, needs_root, put, right, use
from promises_bundle import fuzz, p14_bundles, pack

from neuronjit import bundle, cache, cachefile
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
    one, two = (bundle.export_bundle(str(tmp_path / name)) for name in ("one", "two"))
    assert (one.kernels, one.skipped) == (3, 1) and one.sha256 == two.sha256
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()
    with tarfile.open(tmp_path / "one") as archive:
        assert archive.getnames() == sorted(key(number) for number in range(3))
    assert bundle.export_bundle(str(tmp_path / "one"), keys=[key(1)]).kernels == 1
    assert sorted(os.listdir(tmp_path)) == ["cache", "one", "two"]


def test_an_export_that_fails_leaves_nothing(place, tmp_path):
    with pytest.raises(FileNotFoundError):
        bundle.export_bundle(str(tmp_path / "nowhere" / "kernels.njc"))
    (tmp_path / "taken").mkdir()
    with pytest.raises(IsADirectoryError):
        bundle.export_bundle(str(tmp_path / "taken"))
    assert sorted(os.listdir(tmp_path)) == ["cache", "taken"]


def test_an_import_needs_trust_or_the_digest(place, tmp_path):
    path = str(tmp_path / "kernels.njc")
    carried = bundle.export_bundle(path)
    use(tmp_path / "other")
    with pytest.raises(BundleError, match=f"holds code.*{carried.sha256}"):
        bundle.import_bundle(path)
    with pytest.raises(BundleError, match=f"has SHA-256 {carried.sha256}"):
        bundle.import_bundle(path, trust=True, sha256="0" * 64)
    assert not (tmp_path / "other").exists()
    done = bundle.import_bundle(path, sha256=carried.sha256.upper())
    assert (done.path, done.kernels, done.skipped) == (str(tmp_path / "other"), 3, 0)
    assert all(right(cache.load(key(number)), number) for number in range(3))
    assert (tmp_path / "other").stat().st_mode & 0o777 == 0o700


def test_an_altered_bundle_is_refused(place, tmp_path):
    path = tmp_path / "kernels.njc"
    carried = bundle.export_bundle(str(path))
    data = bytearray(path.read_bytes())
    data[2000] ^= 1
    path.write_bytes(data)
    with pytest.raises(BundleError, match="checksum"):
        bundle.import_bundle(str(path), trust=True)
    path.write_bytes(pack((key(5), cachefile.encode(cachekit.toy(5)))))  # sound, but another
    with pytest.raises(BundleError, match="SHA-256"):
        bundle.import_bundle(str(path), sha256=carried.sha256)


def test_a_bundle_that_changes_meanwhile_is_refused(place, tmp_path):
    path = tmp_path / "kernels.njc"
    bundle.export_bundle(str(path))
    survey = bundle._survey

    def then_change(file):
        found = survey(file)
        data = bytearray(path.read_bytes())
        data[2000] ^= 1
        with open(path, "r+b") as other:  # in place: the open file sees it
            other.write(data)
        return found

    use(tmp_path / "other")
    with (
        cachekit.patched(bundle, _survey=then_change),
        pytest.raises(BundleError, match="changed while"),
    ):
        bundle.import_bundle(str(path), trust=True)
    assert os.listdir(tmp_path / "other") == []


def test_what_is_there_is_kept_and_what_is_damaged_replaced(place, tmp_path):
    path = str(tmp_path / "kernels.njc")
    bundle.export_bundle(path)
    (place / key(1)).write_bytes(b"damaged")
    before = (place / key(0)).stat().st_ino
    done = bundle.import_bundle(path, trust=True)
    assert (done.kernels, done.skipped) == (1, 2)
    assert (place / key(0)).stat().st_ino == before
    assert right(cache.load(key(1)), 1)


@needs_root
def test_a_site_directory_is_for_all_users_to_read(place, tmp_path):
    path = str(tmp_path / "kernels.njc")
    bundle.export_bundle(path)
    with cachekit.for_all_users() as base:
        site = base / "opt" / "kernels"
        before = os.umask(0o077)
        try:
            bundle.import_bundle(path, trust=True, to=str(site))
        finally:
            os.umask(before)
        assert {stat.S_IMODE(item.stat().st_mode) for item in site.iterdir()} == {0o644}

        def work():
            use(base / "none", site)
            return [right(cache.load(key(number)), number) for number in range(3)]

        assert Child(work, uid=ALICE).finish() == {"value": [True] * 3, "warnings": []}


def test_an_unsafe_destination_is_named(place, tmp_path):
    path = str(tmp_path / "kernels.njc")
    bundle.export_bundle(path)
    into = tmp_path / "open"
    into.mkdir()
    into.chmod(0o777)
    with pytest.raises(BundleError, match=r"open' can be written by everybody \(owner .*0777"):
        bundle.import_bundle(path, trust=True, to=str(into))
    assert os.listdir(into) == []


def test_without_a_home_it_asks_where_to(place, tmp_path, monkeypatch):
    path = str(tmp_path / "kernels.njc")
    bundle.export_bundle(path)
    monkeypatch.setattr(bundle, "user_dir", lambda: "")
    with pytest.raises(BundleError, match="say where to"), heard():
        bundle.import_bundle(path, trust=True)


def test_a_pipe_is_no_bundle(tmp_path):
    with pytest.raises(BundleError, match="no regular file"):
        bundle.import_bundle("/dev/null", trust=True)
