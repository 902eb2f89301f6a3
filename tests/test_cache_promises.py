"""P1 to P13, P15 and P16 of the cache, at a size that takes seconds; P14 is in test_bundle.py.

benchmarks/cache_torture.py runs the same experiments in full.
"""

import shutil

import cachekit
import pytest
from cachekit import needs_linux, needs_root, needs_strace, toy
from promises import (
    p1_race,
    p2_flips,
    p3_kills,
    p3_kills_at_calls,
    p4_heal,
    p5_errors,
    p7_holders,
    p8_threads,
    p9_many,
    p12_cap,
    p15_verify,
    p16_cost,
)
from promises_keys import p10_keys
from promises_places import ENVIRONMENTS, HOSTILE, p6_environment, p11_nodes, p13_layout, p13_swaps

pytestmark = needs_linux
needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    """Experiments set variables as they need them."""
    for name in ("NEURONJIT_CACHE_DIR", "NEURONJIT_CACHE_PATH", "NEURONJIT_CACHE_SIZE"):
        monkeypatch.setenv(name, "")
    yield
    cachekit.forget()


@pytest.fixture
def base():
    with cachekit.for_all_users() as path:
        yield path


def test_p1_a_crowd_builds_each_kernel_once(tmp_path):
    figures = p1_race(tmp_path, processes=16, rounds=4, keys=8)
    assert figures["compiles per key and round"] == figures["most"] == 1
    assert figures["wrong"] == figures["exceptions"] == 0


def test_p2_no_changed_byte_is_loaded(tmp_path):
    offsets = [*range(700), *range(700, 33_000, 40)]  # all of the header and metadata
    figures = p2_flips(tmp_path / "cache", toy(1, size=33_000), offsets)
    assert figures["rejected"] == figures["tried"] > 1500
    healed, heals = figures["healed"].split("/")
    assert healed == heals and figures["sound again"]


def test_p3_death_at_any_change_of_the_directory_harms_nothing(tmp_path):
    figures = p3_kills(tmp_path, kills=25)
    assert figures["kills"] == 25 and figures["bad"] == figures["hangs"] == 0
    assert figures["slowest next call, s"] < 5 and figures["after the next sweep"] == 0


@needs_strace
def test_p3_death_at_any_call_harms_nothing(tmp_path):
    figures = p3_kills_at_calls(tmp_path)
    assert figures["points"] > 50 and figures["bad"] == figures["hangs"] == 0


def test_p4_damage_heals_without_help(tmp_path):
    assert p4_heal(tmp_path) == {"healed": 4, "of": 4}


@needs_strace
def test_p5_no_error_of_the_disk_fails_a_call(tmp_path):
    figures = p5_errors(tmp_path)
    assert figures["failed"] == [] and figures["right"] == figures["cells"] == 160


@needs_root
@pytest.mark.parametrize("name", ENVIRONMENTS)
def test_p6_environment(base, name):
    kept, warnings = p6_environment(base, name)
    assert kept, warnings


def test_p7_a_holder_that_died_or_stopped_blocks_nobody(tmp_path):
    figures = p7_holders(tmp_path)
    assert figures["killed: right"] and figures["stopped: right"]
    assert figures["killed: seconds"] < 1
    assert 1 <= figures["stopped: seconds"] < 3
    assert figures["waiting was told"] == 2  # that it waits, and that it waits no longer


def test_p8_threads_and_forks(tmp_path):
    figures = p8_threads(tmp_path, rounds=6)
    assert figures["hangs"] == figures["wrong"] == 0
    assert figures["compiles per key"] == figures["most"] == 1


@needs_compiler
def test_p9_many_kernels_never_cross(tmp_path):
    figures = p9_many(tmp_path, kernels=100)
    assert figures["wrong"] == figures["descriptors more than before"] == 0


def test_p10_keys_are_stable_and_follow_every_input(tmp_path):
    figures = p10_keys(tmp_path)
    assert figures["the same in all processes"] == figures["specs"] == 200
    assert figures["that do not"] == [] and figures["inputs"] >= 25


def test_p11_machines_share_a_directory(tmp_path):
    figures = p11_nodes(tmp_path)
    assert figures["most compiles per key and node"] <= 1
    assert figures["wrong"] == figures["rebuilt for a clock a day off"] == 0
    assert figures["right while lookups are hidden"]


def test_p12_the_cap_holds_and_hurts_nobody(tmp_path):
    figures = p12_cap(tmp_path, cap=2_000_000, writers=4, seconds=3)
    assert figures["wrong"] == figures["exceptions"] == figures["warnings"] == 0
    assert figures["calls"] > 100 and figures["overshoot, MB"] <= 0.5


@needs_root
@pytest.mark.parametrize("name", HOSTILE)
def test_p13_planted_code_is_not_loaded(base, name):
    ran, named, good, warnings = p13_layout(base, name)
    assert not ran and named and good, warnings


@needs_root
def test_p13_nor_when_it_is_swapped_in(base):
    figures = p13_swaps(base, tries=1000)
    assert figures["planted code loaded"] == 0 < figures["loaded"]


def test_p15_verify_tells_the_truth(tmp_path):
    (tmp_path / "cache").mkdir(mode=0o700)
    figures = p15_verify(tmp_path / "cache", count=1000, damaged=100)
    assert figures["found"] == figures["removed by --fix"] == 100
    assert figures["false alarms"] == figures["sound ones removed"] == 0


@needs_compiler
def test_p16_a_load_costs_little(tmp_path):
    assert p16_cost(tmp_path)["all"] < 20_000  # microseconds; the figure itself: cache_torture.py
