"""`neuronjit-cache`: look into the kernel cache, fill it ahead, check it, clear it, carry it."""

from __future__ import annotations

import argparse
import io
import os
import platform
import re
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import asdict
from functools import partial
from importlib import metadata
from typing import Any

import torch

from .cache import admin, bundles, store
from .cache.folders import search_path, user_dir
from .errors import InputTypeError, NeuronJitError, SpecError
from .kernels import ahead, build, manifest, targets
from .kernels.spec import DTYPES
from .kernels.targets import TARGETS
from .models.block import RESETS
from .run import front_end
from .settings import CacheWarning, switches
from .terminal import ask, complain, in_bytes, progress, say, say_json, say_lines, table

FOUND, USAGE, INTERRUPTED = 1, 2, 130
_LIBRARIES = ("torch", "jinja2", "platformdirs", "cupy-cuda12x", "cupy-cuda13x", "cupy")
_SECONDS = {"m": 60, "h": 3600, "d": 86400, "w": 604800}
_CHOICES = list(ahead.choices.__kwdefaults__ or ())  # options that it takes by these names


def _path(args: argparse.Namespace) -> int:  # as all commands, it returns the exit code
    user = user_dir()
    say(args.json, {"user": user, "search": search_path()}, user)
    return 0 if user else FOUND


def _info(args: argparse.Namespace) -> int:
    """The page to paste into a bug report."""
    cpu, cuda = targets.by_name("cpu"), targets.by_name("cuda")
    about = [("neuronjit", build.version()), ("python", platform.python_version())]
    for library in _LIBRARIES:
        with suppress(metadata.PackageNotFoundError):
            about.append((library, metadata.version(library)))
    about += [("machine", platform.platform()), ("cpu", cpu.arch())]
    about += [
        ("cpu compiler", _compiler(cpu, cpu.arch())),
        ("cuda compiler", _compiler(cuda, "sm_90")),
    ]
    gpus = range(torch.cuda.device_count()) if torch.cuda.is_available() else ()
    about += [("gpu", f"{torch.cuda.get_device_name(i)} {cuda.arch(i)}") for i in gpus]
    about += switches().items()
    directories = admin.directories()
    if args.json:
        say_json({"about": about, "directories": [asdict(found) for found in directories]})
        return 0
    table(("", ""), about)
    rows = []
    for d in directories:
        whose = "" if d.mode is None else f"{d.owner} {d.mode:04o}{' writable' * d.writable}"
        trusted = d.why or "; ".join(["yes", *d.lenient])
        rows.append((d.role, d.path, trusted, whose, d.entries, in_bytes(d.bytes)))
    table(("role", "directory", "trusted", "owner, mode", "kernels", "size"), rows)
    return 0


def _compiler(target: Any, arch: str) -> str:
    try:
        words = str(target.fingerprint(arch)["compiler"])
        return f"{words} ({target.compiler()[0]})" if hasattr(target, "compiler") else words
    except NeuronJitError as error:
        return f"none: {error}"


def _list(args: argparse.Namespace) -> int:
    found = sorted(admin.entries(), key=lambda e: (str(e.meta.get("symbol")), e.key))
    if args.json:
        say_json([asdict(entry) for entry in found])
        return 0
    table(
        ("key", "kernel", "target", "arch", "size", "last used"),
        (
            (
                e.key[:12], e.problem or e.meta.get("symbol"), e.meta.get("target"),
                e.meta.get("arch"), in_bytes(e.size), _date(e.used),
            )
            for e in found
        ),
    )  # fmt: skip
    return 0


def _date(seconds: float) -> str:
    try:
        return time.strftime("%Y-%m-%d %H:%M", time.localtime(seconds))
    except (ValueError, OverflowError, OSError):  # no year that a calendar has
        return f"{seconds:.4g} s"


def _show(args: argparse.Namespace) -> int:
    (key,) = _keys([args.key])
    entry = store.load(key)
    if entry is None:
        raise NeuronJitError(f"kernel {key} cannot be used; `neuronjit-cache verify` says why")
    if args.json:
        say_json({"key": key, "meta": entry.meta, "source": entry.source})
        return 0
    table(("", ""), [("key", key), *entry.meta.items(), ("binary", in_bytes(len(entry.binary)))])
    say_lines(entry.source.expandtabs())
    return 0


def _stats(args: argparse.Namespace) -> int:
    found = admin.stats()
    del found["this process"]  # that is this command, which runs no kernel
    if args.json:
        say_json(found)
        return 0
    rows = [("size", in_bytes(found.pop("bytes"))), ("at most", in_bytes(found.pop("cap")))]
    for name, value in found.items():
        parts = value.items() if isinstance(value, dict) else [("", value)]
        rows += [(f"{name} {what}".strip(), str(number)) for what, number in parts]
    table(("", ""), rows)
    return 0


def _verify(args: argparse.Namespace) -> int:
    checked, findings = admin.verify(build.why_no_kernel, fix=args.fix)
    if findings and not args.json:
        rows = [(f.key or f.path, f.why, "removed" if f.removed else "") for f in findings]
        table(("kernel or directory", "why it is not used", ""), rows)
    data = {"checked": checked, "findings": [asdict(finding) for finding in findings]}
    say(args.json, data, f"{checked} kernels read, {len(findings)} findings")
    return FOUND if findings else 0


def _clear(args: argparse.Namespace) -> int:
    user = user_dir()
    if not (args.older_than or args.neurons or args.stale_only or args.yes):
        sizes = [entry.size for entry in admin.entries() if entry.path == user]
        if not ask(f"Delete all {len(sizes)} kernels ({in_bytes(sum(sizes))}) in {user}?"):
            complain("nothing was deleted; --yes does it without asking")
            return FOUND
    version = build.version() if args.stale_only else None
    kernels = size = 0
    for model in args.neurons or [None]:
        done = admin.clear(older_than=args.older_than, model=model, stale_for=version)
        kernels, size = kernels + done[0], size + done[1]
    data = {"kernels": kernels, "bytes": size, "directory": user}
    say(args.json, data, f"deleted {kernels} kernels ({in_bytes(size)}) in {user}")
    return 0


def _export(args: argparse.Namespace) -> int:
    done = bundles.export_bundle(args.file, keys=_keys(args.keys) if args.keys else None)
    words = f"exported {done.kernels} kernels to {done.path}, {done.skipped} unsound ones left out"
    say(args.json, asdict(done), f"{words}\nSHA-256 {done.sha256}")
    return FOUND if done.skipped or not done.kernels else 0


def _import(args: argparse.Namespace) -> int:
    done = bundles.import_bundle(args.file, trust=args.trust, sha256=args.sha256, to=args.to)
    words = f"imported {done.kernels} kernels into {done.path}, {done.skipped} were there"
    say(args.json, asdict(done), f"{words}\nSHA-256 {done.sha256}")
    return 0


def _prebuild(args: argparse.Namespace) -> int:
    options = {name: value for name in _CHOICES if (value := getattr(args, name))}
    if not args.neurons and (options or not (args.manifest or args.front_end)):
        raise SpecError(
            "say what to build: --neuron NAME and its options, --manifest FILE, or --front-end"
        )
    chosen = partial(ahead.choices, args.neurons or (), **options)
    wanted = manifest.read(args.manifest) if args.manifest else ()
    work = []
    if args.neurons or args.manifest:
        work = ahead.jobs(wanted, chosen, args.targets or (), args.archs or ())
    start, before = time.perf_counter(), build.stats()
    with progress(len(work)) as advance:
        built, failed = ahead.prebuild(work, args.jobs, advance)
    if args.front_end:
        built.append(front_end.entry())
    seconds, after = time.perf_counter() - start, build.stats()
    there = {entry.key: entry.size for entry in admin.entries() if not entry.problem}
    keys = {entry.key for entry in built}
    if lost := keys - there.keys():
        complain(f"{len(lost)} kernels could not be kept; see `neuronjit-cache info`")
    for (spec, arch), error in failed:
        complain(f"{spec.symbol} for {arch}: {error}")
    data: dict[str, Any] = {name: after[name] - before[name] for name in after}
    data |= {"failed": len(failed), "lost": len(lost), "seconds": round(seconds, 3)}
    data |= {"bytes": sum(there.get(key, 0) for key in keys), "directory": user_dir()}
    words = "{compiled} kernels compiled in {seconds:.1f} s, {loaded} were there, {failed} failed"
    words += ", and the front end is there" if args.front_end else ""
    say(args.json, data, f"{words.format(**data)}; together {in_bytes(data['bytes'])}")
    return FOUND if failed or lost or not built else 0


def _keys(prefixes: Iterable[str]) -> list[str]:
    """The full key that each prefix begins. Raises NeuronJitError if none does, or several do."""
    there, chosen = {entry.key for entry in admin.entries()}, []
    for prefix in prefixes:
        found = sorted(key for key in there if key.startswith(prefix.lower()))
        if len(found) != 1:
            which = " ".join(["several kernels:", *found[:4]]) if found else "no kernel"
            raise NeuronJitError(f"{ascii(prefix)[:80]} begins the key of {which}")
        chosen += found
    return chosen


def _age(text: str) -> float:
    if not (match := re.fullmatch(r"(\d{1,6})([mhdw])", text, re.ASCII)):
        raise argparse.ArgumentTypeError(f"{ascii(text)[:40]} is no age such as 12h, 30d or 4w")
    return float(match[1]) * _SECONDS[match[2]]


def _file(text: str) -> str:
    if "\0" in text:
        raise argparse.ArgumentTypeError(f"{ascii(text)[:80]} is no file's name")
    return text


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("neuronjit-cache", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(run: Callable[..., int], words: str, *examples: str) -> Callable[..., Any]:
        name = run.__name__[1:]
        shown = "\n".join(f"  neuronjit-cache {name} {example}" for example in examples or [""])
        made = commands.add_parser(
            name, help=words.partition("\n")[0], description=words, epilog=f"examples:\n{shown}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )  # fmt: skip
        made.set_defaults(run=run)
        made.add_argument("--json", action="store_true", help="print JSON")
        return made.add_argument

    names: dict[str, Any] = {"nargs": "+", "metavar": "NAME"}
    yes: dict[str, Any] = {"action": "store_true"}
    file: dict[str, Any] = {"type": _file, "metavar": "FILE"}
    command(_path, "print where kernels are kept")
    command(_info, "show directories and whether each is trusted, compilers, GPUs, versions")
    command(_list, "list all kernels", "", "--json")
    option = command(_show, "show metadata and source of a kernel", "3f9a")
    option("key", metavar="KEY", help="the key, or how it begins")
    command(_stats, "count kernels by target and neuron, and those that had to be built again")
    option = command(
        _prebuild,
        "compile kernels ahead of time, for any GPU and without one\n\n"
        "--neuron builds what training in layers of it looks up, whatever the sizes: forward, and\n"
        "backward of gradients that arrive at spikes and last states, with parameters that are\n"
        "numbers (PLIF's reciprocal_tau: learned). What a run does besides is an option each. A\n"
        "manifest, written by a run with NEURONJIT_RECORD=FILE, has just the kernels of that run.",
        "--neuron lif plif --reset hard soft --dtype float32 float16 --arch sm_80 sm_90 --jobs 2",
        "--manifest kernels.jsonl",
        "--manifest kernels.jsonl --target cpu",
    )
    option("--manifest", **file, help="the kernels of a run")
    option("--front-end", **yes, help="what NEURONJIT_FRONT_END=compiled loads")
    option("--neuron", dest="neurons", **names, help="built-in neurons, e.g. lif")
    option("--surrogate", dest="surrogates", **names, help="default: atan sigmoid")
    option("--reset", dest="resets", nargs="+", choices=tuple(RESETS), help="default: hard")
    option("--dtype", dest="dtypes", nargs="+", choices=list(DTYPES), help="default: float32")
    option("--detach-reset", **yes, help="detach_reset=True instead of False")
    option("--smooth", **yes, help="spiking=False instead of True")
    option("--record", **names, help="also while these are recorded (together), e.g. v h")
    option("--learn", **names, help="with gradients of these parameters, e.g. tau")
    option("--per-neuron", **names, help="with tensors over neurons as these parameters")
    option("--per-step", **names, help="with these inputs as tensors that all neurons share")
    option("--target", dest="targets", nargs="+", choices=TARGETS, help="default: that of --arch")
    option("--arch", dest="archs", **names, help="e.g. sm_90 x86-64-v3; default: recorded, or here")
    option("--jobs", type=int, default=os.cpu_count(), metavar="N", help="default: %(default)s")
    option = command(_verify, "read every byte of every kernel: is all sound?", "", "--fix")
    option("--fix", **yes, help="remove what is not")
    option = command(_clear, "delete kernels of yours", "--older-than 30d --neuron lif", "--yes")
    option("--older-than", type=_age, default=0.0, metavar="AGE", help="not used for so long: 30d")
    option("--neuron", dest="neurons", **names, help="of these neurons")
    option("--stale-only", **yes, help="made by another version of neuronjit")
    option("--yes", **yes, help="do not ask before deleting everything")
    option = command(_export, "write kernels to one file, to carry elsewhere", "kernels.njc")
    option("file", **file)
    option("keys", metavar="KEY", nargs="*", help="default: all")
    option = command(_import, "take in such a file", "kernels.njc --trust --to /opt/neuronjit")
    option("file", **file)
    option("--trust", **yes, help="it is from where you would run a program")
    option("--sha256", metavar="HEX", help="what `export` printed")
    option(
        "--to", type=_file, metavar="DIR", help="a folder for NEURONJIT_CACHE_PATH; default: yours"
    )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command. Returns 0; 1 if it found something or failed, 2 if it was called wrongly."""
    for name in ("stdin", "stdout", "stderr"):
        if getattr(sys, name) is None:  # closed by who started this
            setattr(sys, name, io.StringIO())
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        with warnings.catch_warnings():
            warnings.showwarning = lambda message, *_, **__: complain(f"warning: {message}")
            warnings.simplefilter("always", CacheWarning)  # under -W error too: said, not raised
            args = _parser().parse_args(argv)
            code = int(args.run(args))
            sys.stdout.flush()
            return code
    except SystemExit as done:  # argparse has printed its help, or what is wrong
        return int(done.code or 0)
    except KeyboardInterrupt:
        complain("interrupted; what was finished is kept")
        return INTERRUPTED
    except BrokenPipeError:  # `| head` has read enough; Python would flush, and complain, once more
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FOUND
    except (NeuronJitError, OSError) as error:
        complain(str(error))
        return USAGE if isinstance(error, SpecError | InputTypeError) else FOUND


if __name__ == "__main__":
    sys.exit(main())
