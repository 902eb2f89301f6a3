"""The cache's promises as experiments: each returns its figures, at whatever size it is run.

tests/test_cache_promises.py runs them small and holds the figures to the promise;
benchmarks/cache_torture.py runs them in full. Damage, death, errors and races are here; hostile
places are in promises_places.py.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import os
import random
import shutil
import signal
import statistics
import struct
import subprocess
import tempfile
import threading
import time
from pathlib import Path

import cachekit
from cachekit import (
    Child,
    Died,
    Inotify,
    crowd,
    get,
    heard,
    key,
    patched,
    put,
    right,
    toy,
    traced,
    use,
)

from neuronjit.cache import admin, entries, folders, locks, store

ERRORS = ["EIO", "ENOSPC", "EDQUOT", "EROFS", "EACCES"]
ERRORS += ["ESTALE", "EBUSY", "ENOLCK", "ENOSYS", "EMFILE"]
CALLS = {  # a "?" lets strace pass over calls that this processor does not have
    "open": "openat,?open",
    "mkdir": "?mkdir,mkdirat",
    "write": "write,pwrite64",
    "fsync": "fsync,fdatasync",
    "rename": "?rename,renameat,?renameat2",
    "unlink": "?unlink,unlinkat",
    "lock": "flock,fcntl",
    "fstat": "fstat,?newfstatat,?statx,?lstat,?stat",
}


def compiles(path):
    return os.path.getsize(path) if os.path.exists(path) else 0


def p1_race(directory, processes, rounds, keys, pause=0.002):
    """So many processes on a cold cache, all wanting all kernels, in an order of their own."""

    def work(index, place):
        use(place / "cache")
        numbers = random.Random(index).sample(range(keys), keys)
        wrong, raised = 0, 0
        for number in numbers:
            try:
                entry = get(number, built=place / f"built-{number}", pause=pause)
                wrong += not right(entry, number)
            except Exception:  # noqa: PERF203
                raised += 1
        return wrong, raised

    built, wrong, raised, start = [], 0, 0, time.monotonic()
    for number in range(rounds):
        place = Path(directory, f"round-{number}")
        place.mkdir()
        found = crowd(processes, work, place)
        wrong += sum(w for w, _ in found)
        raised += sum(r for _, r in found)
        built += [compiles(place / f"built-{number}") for number in range(keys)]
        shutil.rmtree(place)
    return {
        "processes": processes,
        "rounds": rounds,
        "keys": keys,
        "calls": processes * rounds * keys,
        "compiles per key and round": statistics.mean(built),
        "most": max(built),
        "wrong": wrong,
        "exceptions": raised,
        "seconds": round(time.monotonic() - start, 1),
    }


def p2_flips(directory, entry, offsets=None, random_flips=200, heal_every=100):
    """Every byte (or those at `offsets`) changed, random bits flipped, cut, another's file."""
    use(directory)
    path = Path(directory, entry.key)
    other = toy(10**6, len(entry.binary))
    sound, tried, accepted, healed, heals = entries.encode(entry), 0, 0, 0, 0
    Path(directory).mkdir(exist_ok=True, mode=0o700)
    path.write_bytes(sound)
    path.chmod(0o600)
    generator = random.Random(0)

    def attempt():
        nonlocal tried, accepted, healed, heals
        tried += 1
        accepted += store.load(entry.key) is not None
        if tried % heal_every == 0:
            heals += 1
            made = store.load_or_make(entry.key, lambda: entry)
            loaded = store.load(entry.key)
            healed += made is entry and loaded is not None and loaded.binary == entry.binary
            path.write_bytes(sound)

    with heard():
        chosen = range(len(sound)) if offsets is None else offsets
        flips = [(at, generator.randrange(1, 256)) for at in chosen]
        flips += [
            (generator.randrange(len(sound)), 1 << generator.randrange(8))
            for _ in range(random_flips)
        ]
        for at, change in flips:
            with open(path, "r+b", buffering=0) as file:
                os.pwrite(file.fileno(), bytes([sound[at] ^ change]), at)
            attempt()
            with open(path, "r+b", buffering=0) as file:
                os.pwrite(file.fileno(), sound[at : at + 1], at)
        for size in [*range(0, len(sound), 512), len(sound) - 1]:
            path.write_bytes(sound[:size])
            attempt()
        path.write_bytes(sound + b"\0")
        attempt()
        path.write_bytes(entries.encode(other))  # sound, but another kernel's
        attempt()
        path.write_bytes(sound)
        whole = store.load(entry.key) == entry
    return {
        "bytes": len(sound),
        "tried": tried,
        "rejected": tried - accepted,
        "healed": f"{healed}/{heals}",
        "sound again": whole,
    }


def _after_death(directory, numbers):
    """What the next process finds: (right, seconds, damaged entries)."""
    start = time.monotonic()
    use(directory)
    with heard():
        good = all(right(get(number), number) for number in numbers)
    seconds = time.monotonic() - start
    return good, seconds, len(admin.verify()[1])


def _swept(directory):
    """Temporary files before and after the next sweep, once they are old enough to be nobody's."""
    left = cachekit.other_files(directory)
    for name in left:
        os.utime(Path(directory, name), (1, 1))
    use(directory)
    with heard():
        get(10**6)
    return len(left), len(cachekit.other_files(directory))


def p3_kills(directory, kills, seed=0):
    """A process group killed at a random change of the cache's directory."""
    generator, done, bad, hangs, slowest = random.Random(seed), 0, 0, 0, 0.0
    place = Path(directory, "cache")
    place.mkdir(mode=0o700)

    def work(first):
        for number in itertools.count(first):
            get(number, size=100_000)

    for attempt in range(kills):
        use(place)
        first = attempt * 100
        child = Child(work, first, wait=True, group=True)
        watch = Inotify(place)
        child.go()
        watch.wait(generator.randrange(1, 15), 30)
        os.killpg(child.pid, signal.SIGKILL)
        done += child.wait_status() == signal.SIGKILL
        watch.close()
        try:
            good, seconds, damaged = Child(_after_death, place, range(first, first + 4)).result(10)
            bad += not good or damaged > 0
            slowest = max(slowest, seconds)
        except Died:
            hangs += 1
        for name in cachekit.kernel_files(place):
            os.unlink(place / name)
    left, swept = _swept(place)
    return {
        "kills": done,
        "bad": bad,
        "hangs": hangs,
        "slowest next call, s": round(slowest, 3),
        "temporary files left by the dead": left,
        "after the next sweep": swept,
    }


def p3_kills_at_calls(directory, calls=None):
    """Killed at the k-th call of each kind, for every k there is."""
    points, bad, hangs = 0, 0, 0
    names = [*CALLS.values(), "read,pread64", "close"] if calls is None else calls
    for names_of_call in names:
        for k in itertools.count(1):
            place = Path(directory, f"{points}-{k}-{names_of_call[:5].strip('?')}")
            use(place)
            child = Child(lambda: right(get(1), 1), wait=True, setup=warm_up, coded=True)
            inject = f"inject={names_of_call}:signal=SIGKILL:when={k}"
            with traced(child.pid, "-e", f"trace={names_of_call}", "-e", inject):
                child.go()
                status = child.wait_status()
            if os.WIFEXITED(status):  # there is no k-th call: it lived
                bad += os.WEXITSTATUS(status) != 1
                break
            points += 1
            try:
                good, _, damaged = Child(_after_death, place, [1, 2]).result(5)
                bad += not good or damaged > 0
            except Died:
                hangs += 1
            shutil.rmtree(place, ignore_errors=True)
    return {"points": points, "bad": bad, "hangs": hangs}


def warm_up():
    """Everything that is imported late is imported, before errors are injected."""
    before = os.environ["NEURONJIT_CACHE_DIR"]
    with tempfile.TemporaryDirectory() as scratch:
        use(scratch)
        get(10**6)
        cachekit.forget()
        get(10**6)
    use(before)


def p4_heal(directory):
    """Zero bytes, half, one too few, zeros: run twice."""
    damages = {
        "empty": lambda data: b"",
        "half": lambda data: data[: len(data) // 2],
        "one byte less": lambda data: data[:-1],
        "zeros": lambda data: bytes(len(data)),
    }
    healed, built = 0, Path(directory, "built")
    for number, damage in enumerate(damages.values()):
        use(Path(directory, f"cache-{number}"))
        get(number)
        path = Path(directory, f"cache-{number}", key(number))
        path.write_bytes(damage(path.read_bytes()))
        with heard() as texts:
            first = right(get(number, built=built), number)
            second = right(get(number, built=built), number)
        healed += first and second and len(texts) == 1 and compiles(built) == number + 1
    return {"healed": healed, "of": len(damages)}


def _cell(number):
    """0..9: right, with so many warnings; 50: wrong."""
    with heard() as texts:
        good = right(get(number), number)
    return min(len(texts), 9) if good else 50


def p5_errors(directory, errors=ERRORS, calls=CALLS):
    """Every error, from each call of a kind all the while, on a cold and a warm cache."""
    cells, good, warned, failed = 0, 0, 0, []
    for (call, names), error, warm in itertools.product(calls.items(), errors, (False, True)):
        place = Path(directory, f"{call}-{error}-{warm}")
        use(place)
        if warm:
            get(1)
            cachekit.forget()
        child = Child(_cell, 1, wait=True, setup=warm_up, coded=True)
        with traced(child.pid, "-e", f"trace={names}", "-e", f"inject={names}:error={error}"):
            child.go()
            status = child.wait_status(30)
        cells += 1
        code = os.WEXITSTATUS(status) if os.WIFEXITED(status) else -1
        good += code in (0, 1)
        warned += code == 1
        if code not in (0, 1):
            failed.append(f"{call} {error} {'warm' if warm else 'cold'}: {code}")
        shutil.rmtree(place, ignore_errors=True)
    return {"cells": cells, "right": good, "with one warning": warned, "failed": failed}


def p7_holders(directory, timeout=1.0):
    """A lock's holder that is killed, with a forked child alive, and one that is stopped."""
    figures = {}
    for name, number in (("killed", signal.SIGKILL), ("stopped", signal.SIGSTOP)):
        place = Path(directory, name)
        use(place)
        started = Path(directory, f"{name}-started")

        def hold(started=started):
            def build():
                child = os.fork()
                if child == 0:
                    time.sleep(timeout + 60)
                    os._exit(0)
                started.write_text(str(child))
                time.sleep(timeout + 60)

            store.load_or_make(key(1), build)

        def wait():
            with (
                patched(locks, TIMEOUT_S=timeout, TELL_AFTER_S=min(5.0, timeout / 4)),
                cachekit.logged() as lines,
            ):
                start = time.monotonic()
                good = right(get(1), 1)
                return good, time.monotonic() - start, lines

        holder = Child(hold, group=True)
        while not (started.exists() and started.read_text()):
            time.sleep(0.005)
        os.kill(holder.pid, number)
        if number == signal.SIGKILL:
            time.sleep(0.02)  # until it is dead
        try:
            good, seconds, lines = Child(wait).result(timeout + 30)
        finally:
            os.killpg(holder.pid, signal.SIGKILL)
            holder.wait_status()
        host = os.uname().nodename
        told = [line for line in lines if key(1) in line and f"{holder.pid} on {host}" in line]
        figures |= {f"{name}: right": good, f"{name}: seconds": round(seconds, 3)}
    return figures | {"waiting was told": len(told)}


def p8_threads(directory, rounds, threads=32, keys=4):
    """Threads that want the same kernels, and children forked before, while and after."""
    wrong, built, hangs = 0, [], 0
    for number in range(rounds):
        place = Path(directory, f"round-{number}")
        place.mkdir()
        use(place / "cache")
        results, start = [], threading.Barrier(threads + 1)

        def all_of(place=place, first=0):
            numbers = [(first + number) % keys for number in range(keys)]
            return [right(get(n, built=place / f"built-{n}", pause=0.003), n) for n in numbers]

        def run(index, start=start, results=results, all_of=all_of):
            start.wait()
            results.extend(all_of(first=index))

        pool = [
            threading.Thread(target=run, args=(index,), daemon=True) for index in range(threads)
        ]
        for thread in pool:
            thread.start()
        children = [Child(all_of)]
        start.wait()
        for pause in (0.0, 0.004, 0.01):
            time.sleep(pause)
            children.append(Child(all_of))
        for thread in pool:
            thread.join(60)
            hangs += thread.is_alive()
        children.append(Child(all_of))
        for child in children:
            try:
                results.extend(child.result(60))
            except Died:  # noqa: PERF203
                hangs += 1
        wrong += (threads + len(children)) * keys - sum(results)
        built += [compiles(place / f"built-{number}") for number in range(keys)]
        shutil.rmtree(place)
    return {
        "rounds": rounds,
        "threads": threads,
        "hangs": hangs,
        "wrong": wrong,
        "compiles per key": statistics.mean(built),
        "most": max(built),
    }


LIBRARY = """
static const volatile int number = 0x11223344;
static const volatile char filling[16384] = {1};  // so that it has the size of a kernel
extern "C" int answer() { return number + filling[1]; }
"""


def shared_object(directory):
    """A real binary, by the real compiler."""
    source, binary = Path(directory, "answer.cpp"), Path(directory, "answer.so")
    source.write_text(LIBRARY)
    command = ["g++", "-O1", "-shared", "-fPIC", "-o", str(binary), str(source)]
    subprocess.run(command, check=True, capture_output=True)
    return binary.read_bytes()


def _library(code, number):
    """The same with another answer: what it takes the compiler 0.1 s to make."""
    entry = toy(number)
    code = code.replace(struct.pack("<i", 0x11223344), struct.pack("<i", number))
    return entries.Entry(entry.key, entry.meta, entry.source, code)


def p9_many(directory, kernels):
    """Many shared objects in one process, evicted and loaded again: which one answers?"""
    from neuronjit.kernels.targets.cpu import dlopen

    code = shared_object(directory)
    use(Path(directory, "cache"))
    wrong, before, libraries = 0, len(os.listdir("/proc/self/fd")), []
    for turn in range(2):
        for number in range(kernels):
            entry = store.load_or_make(key(number), lambda number=number: _library(code, number))
            libraries.append(dlopen(entry.binary))
            wrong += libraries[-1].answer() != number
        if turn == 0:
            admin.clear()
            cachekit.forget()
    wrong += sum(library.answer() != n % kernels for n, library in enumerate(libraries))
    after = len(os.listdir("/proc/self/fd"))
    return {"kernels": kernels, "wrong": wrong, "descriptors more than before": after - before}


def p16_cost(directory, times=200):
    """The first load of a 32 KB kernel in a process, in microseconds: medians."""
    from neuronjit.kernels.targets.cpu import dlopen

    code = shared_object(directory)
    use(Path(directory, "cache"))
    entry = _library(code, 1)
    store.load_or_make(entry.key, lambda: entry)
    stored = Path(directory, "cache", entry.key).read_bytes()

    def median(work):
        seconds = []
        for _ in range(times):
            start = time.perf_counter()
            work()
            seconds.append(time.perf_counter() - start)
        return round(1e6 * statistics.median(seconds), 1)

    return {
        "bytes": len(stored),
        "open, judge, read, check": median(lambda: store.load(entry.key)),
        "of this SHA-256": median(lambda: hashlib.sha256(stored).digest()),
        "memfd and dlopen": median(lambda: dlopen(entry.binary)),
        "all": median(lambda: dlopen(store.load(entry.key).binary)),
    }


def p12_cap(directory, cap, writers, seconds, size=33_000):
    """Writers that never stop and a `clear` now and then, under a cap."""
    place = Path(directory, "cache")
    os.environ["NEURONJIT_CACHE_SIZE"] = str(cap)
    use(place)
    end = time.monotonic() + seconds

    def write(index):
        wrong = raised = calls = 0
        for number in itertools.count(index * 10**6):
            if time.monotonic() > end:
                return wrong, raised, calls
            try:
                again = max(index * 10**6, number - 3)  # one that it has used a moment ago
                wrong += not right(get(number, size), number) + (not right(get(again, size), again))
                calls += 2
            except Exception:
                raised += 1

    def clear():
        cleared = 0
        while time.monotonic() < end:
            time.sleep(seconds / 5)
            cleared += admin.clear()[0]
        return cleared

    children = [Child(write, index) for index in range(writers)]
    clearer = Child(clear)
    most = 0
    try:
        while time.monotonic() < end:
            with contextlib.suppress(OSError), folders.opened(str(place)) as folder:
                most = max(most, sum(st.st_size for _, st in folder.scan()))
            time.sleep(0.02)
        found = [child.finish(60) for child in children]
    finally:
        del os.environ["NEURONJIT_CACHE_SIZE"]
    return {
        "cap, MB": cap / 1e6,
        "writers": writers,
        "seconds": seconds,
        "calls": sum(f["value"][2] for f in found),
        "cleared": clearer.result(),
        "most, MB": round(most / 1e6, 2),
        "overshoot, MB": round(max(0, most - cap) / 1e6, 2),
        "wrong": sum(f["value"][0] for f in found),
        "exceptions": sum(f["value"][1] for f in found),
        "warnings": sum(len(f["warnings"]) for f in found),
    }


def p15_verify(directory, count, damaged, seed=0):
    """Kernels damaged in five ways: which of them `verify` finds, and what --fix removes."""
    use(directory)
    generator = random.Random(seed)
    paths = [put(number, directory) for number in range(count)]
    chosen = generator.sample(range(count - 1), damaged)
    for way, number in enumerate(chosen):
        data = bytearray(paths[number].read_bytes())
        if way % 5 == 0:
            data[generator.randrange(len(data))] ^= 1 << generator.randrange(8)
        elif way % 5 == 1:
            del data[generator.randrange(len(data)) :]
        elif way % 5 == 2:
            data[:] = bytes(len(data))
        elif way % 5 == 3:
            data[:] = entries.encode(toy(count + number))
        else:
            data += b"\0"
        paths[number].write_bytes(data)
    start = time.monotonic()
    checked, found = admin.verify()
    seconds = time.monotonic() - start
    truth = {key(number) for number in chosen}
    admin.verify(fix=True)
    left = set(cachekit.kernel_files(directory))
    return {
        "checked": checked,
        "damaged": len(truth),
        "found": len(truth & {finding.key for finding in found}),
        "false alarms": len({finding.key for finding in found} - truth),
        "removed by --fix": count - len(left),
        "sound ones removed": len({path.name for path in paths} - truth - left),
        "seconds": round(seconds, 3),
    }
