"""Damaged and hostile files: every kind of saved result and of input file, changed in many ways, and
what reading it does.

    python benchmarks/hostile_files.py --n 12000 --output benchmarks/results/hostile_files.md

A mutation is read in a process of its own, with 5 seconds and 1 GiB beyond what the process had.
Allowed are: it is read as what it was; one of the package's own errors. A change that a person
could have made (text of an input; a saved result whose checksums were made to fit again) may also
be read as something else. Everything else counts as a fault: another error, a crash, too long, too
large, a saved result that is silently another, a file outside that is opened or changed, code that
is run, a process or a connection that is begun. Faults are listed, and their files kept with
`--keep FOLDER`.
"""

from __future__ import annotations

import argparse
import collections
import hashlib
import json
import multiprocessing
import os
import pathlib
import random
import resource
import select
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from typing import Any

import pages
import torch
from hostile_changes import MENDED, MUTATORS

import expertsteer_lens as esl
from expertsteer_lens.benchmarks import public
from expertsteer_lens.cli.inputs import read_config, read_texts
from expertsteer_lens.data.behaviour import Behaviour
from expertsteer_lens.data.contrast import ContrastPairs
from expertsteer_lens.errors import ExpertSteerError
from expertsteer_lens.files.kinds import kind_of

SECONDS, MEMORY = 5.0, 2**30


# -- what is read ---------------------------------------------------------------------------------


def write_templates(root: pathlib.Path) -> None:
    """A folder of each kind."""
    from expertsteer_lens.files.export import to_gguf

    sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1] / "tests"))
    import results

    expert, target = esl.zoo.load_pair(host="huggingface")
    pairs, anchors = esl.zoo.contrast_pairs(8), esl.zoo.anchors(20)
    behaviour = esl.zoo.behaviour(8)
    steps = esl.ExpertSteer(
        esl.ExpertSteerConfig(
            mi=esl.MIConfig(n_permutations=2, n_bootstrap=10, n_components=4),
            pairing=esl.PairingConfig(n_candidates=2, n_layers=2, skip_first=0, skip_last=0),
            rfm=esl.RFMConfig(bandwidth=(1.0,), n_rounds=2),
        )
    )
    hooks = ["blocks.1.hook_resid_post", "blocks.2.hook_resid_post"]
    fit = steps.fit(
        expert,
        target,
        pairs,
        anchors=anchors,
        behaviour=behaviour,
        expert_hook_names=hooks,
        target_hook_names=hooks,
        progress=False,
    )
    key = next(iter(fit.rfms))
    plan = fit.plan(coefficient=0.1)
    things = {
        "plan": plan,
        "fit": fit,
        "states": fit.data.expert_pair_states,
        "aligner": fit.aligners[key],
        "rfm": fit.rfms[key],
        "layer-pair scores": fit.layer_pair_mi,
        "layer pairs": fit.layer_pairs,
        "calibration": results.calibration(),
        "evaluation": results.evaluation(),
    }
    for name, thing in things.items():
        esl.save(thing, root / name / "it")
    store = root / "states in a folder" / "it"
    esl.capture(target, pairs.texts, hooks, labels=pairs.labels, positions="mean", store=store)

    rows = [
        {"positive": p, "negative": n} for p, n in zip(pairs.positive, pairs.negative, strict=True)
    ]
    questions = [
        {"question": f"What is {i}?", "choices": ["a", f"b{i}"], "answer": i % 2} for i in range(9)
    ]
    choices = [f'"[""a"", ""{q["choices"][1]}""]",{q["answer"]}' for q in questions]
    table = [f"{q['question']},{rest}" for q, rest in zip(questions, choices, strict=True)]
    prompts = {n: getattr(behaviour, n) for n in ("prompts", "positive", "negative")}
    for name, content in {
        "pairs": _lines(rows),
        "behaviour": json.dumps(prompts).encode(),
        "anchors": "\n".join(anchors).encode(),
        "chats": _lines([[{"role": "user", "content": a}] for a in anchors]),
        "settings": json.dumps(steps.config.to_dict()).encode(),
        "benchmark": _lines(questions),
        "benchmark, table": "\n".join(["question,choices,answer", *table]).encode(),
    }.items():
        _file_of(root, name).write_bytes(content)
    to_gguf(plan, _file_of(root, "vector, gguf"))
    vectors = {int(k.split(".")[1]): torch.ones(8) for k in hooks}
    torch.save(vectors, _file_of(root, "vector, torch"))


INPUTS: dict[str, tuple[str, Callable[[pathlib.Path], Any]]] = {
    "pairs": ("a.jsonl", ContrastPairs.from_jsonl),
    "behaviour": ("a.json", Behaviour.from_json),
    "anchors": ("a.txt", read_texts),
    "chats": ("a.jsonl", read_texts),
    "settings": ("a.json", lambda path: read_config(path, "anchored")),
    "benchmark": ("a.jsonl", lambda path: public.load("mmlu_anatomy", path=path)),
    "benchmark, table": ("a.csv", lambda path: public.load("mmlu_anatomy", path=path)),
    "vector, gguf": ("a.gguf", esl.SteeringPlan.from_foreign),
    "vector, torch": ("a.pt", esl.SteeringPlan.from_foreign),
}
"""Files of others, without checksums of ours: changed content is read as it stands."""


def reader_of(name: str) -> Callable[[pathlib.Path], Any]:
    """What reads a folder of this kind."""
    if name not in INPUTS:
        return esl.load
    file, read = INPUTS[name]
    return lambda folder: read(folder / file)


def _file_of(root: pathlib.Path, name: str) -> pathlib.Path:
    folder = root / name / "it"
    folder.mkdir(parents=True)
    return folder / INPUTS[name][0]


def _lines(rows: list[Any]) -> bytes:
    return "\n".join(json.dumps(row) for row in rows).encode()


def digest(thing: Any) -> str:
    """Of all that a thing holds."""
    found = hashlib.sha256()
    try:
        kind = kind_of(thing)
    except ExpertSteerError:  # an input: texts, settings
        return hashlib.sha256(repr(_plain(thing)).encode("utf-8", "surrogatepass")).hexdigest()
    saved = kind.write(thing)
    found.update(json.dumps(saved.fields, sort_keys=True).encode())
    for name in sorted(saved.tensors):
        value = saved.tensors[name].contiguous()
        found.update(f"{name}{value.dtype}{tuple(value.shape)}".encode())
        found.update(value.view(torch.uint8).numpy().tobytes() if value.numel() else b"")
    return found.hexdigest()


def _plain(thing: Any) -> Any:
    return {k: v for k, v in vars(thing).items()} if hasattr(thing, "__dict__") else thing


# -- reading in a process of its own --------------------------------------------------------------


def outcome(read: Callable[[Any], Any], folder: pathlib.Path) -> tuple[str, str]:
    """(what happened, its text); the process is forked, so that nothing is left of it."""
    out, back = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(out)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        _in_child(read, folder, back)
    os.close(back)
    deadline, data = time.monotonic() + 4 * SECONDS, b""
    while time.monotonic() < deadline:
        if select.select([out], [], [], deadline - time.monotonic())[0]:
            more = os.read(out, 2**16)
            if not more:
                break
            data += more
    else:
        os.kill(child, signal.SIGKILL)
    os.close(out)
    _, status, used = os.wait4(child, 0)
    if not data:
        return "fault", f"died or hung (status {status}, {used.ru_utime:.1f} s)"
    kind, text = json.loads(data)
    if used.ru_utime + used.ru_stime > SECONDS + 1:
        return "fault", f"took {used.ru_utime + used.ru_stime:.1f} s; {kind}: {text}"
    return kind, text


def _in_child(read: Callable[[Any], Any], folder: pathlib.Path, back: int) -> None:
    touched: list[str] = []
    home = str(folder.parent.parent)

    def audit(event: str, arguments: Any) -> None:
        if event in (
            "os.system",
            "os.exec",
            "subprocess.Popen",
            "socket.connect",
            "os.posix_spawn",
        ):
            touched.append(event)
        if event == "pickle.find_class" and not str(arguments[0]).startswith(
            ("torch", "collections")
        ):
            touched.append(f"{event} {arguments}")
        if event in ("os.remove", "os.rename", "os.mkdir", "os.rmdir", "os.truncate", "os.symlink"):
            touched.append(f"{event} {arguments[0]}")
        if event == "open" and isinstance(arguments[0], str):
            name, _, flags = arguments
            if isinstance(flags, int) and flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
                touched.append(f"wrote {name}")
            elif name.startswith(f"{home}/outside") or name == "/etc/passwd":
                touched.append(f"read {name}")

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    sys.addaudithook(audit)
    resource.setrlimit(resource.RLIMIT_CPU, (int(SECONDS) + 2, int(SECONDS) + 2))
    try:
        found: Any = read(folder)
        touched_by_then = list(touched)
        result = ("read", digest(found))
    except ExpertSteerError as error:
        touched_by_then = list(touched)
        result = ("named", f"{type(error).__name__}: {error}"[:300])
    except BaseException as error:
        touched_by_then = list(touched)
        last = traceback.extract_tb(error.__traceback__)[-1]
        where = f"{pathlib.Path(last.filename).name}:{last.lineno}"
        result = ("fault", f"{type(error).__name__} at {where}: {error}"[:300])
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    if grown * 1024 > MEMORY:
        result = ("fault", f"grew by {grown / 2**20:.1f} GiB; {result[0]}: {result[1]}")
    # What a link leads to is the link's own content; it is read like any file.
    real = [t for t in touched_by_then if not t.startswith("read ")]
    if real:
        result = ("fault", f"touched {real[:3]}; {result[0]}: {result[1]}")
    os.write(back, json.dumps(result).encode())
    os._exit(0)


# -- all of it ------------------------------------------------------------------------------------


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--n", type=int, default=12000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", help="a number: this mutation alone, and where its files are")
    parser.add_argument("--output", type=pathlib.Path)
    parser.add_argument("--keep", type=pathlib.Path, help="folder for the files of faults")
    args = parser.parse_args()
    torch.set_num_threads(1)
    root = pathlib.Path(tempfile.mkdtemp(prefix="hostile-"))
    # In a process of its own: without the models this one stays small, and is forked quickly.
    context = multiprocessing.get_context("spawn")
    maker = context.Process(target=write_templates, args=(root / "templates",))
    maker.start()
    maker.join()
    templates = {
        p.name: (p / "it", reader_of(p.name)) for p in sorted((root / "templates").iterdir())
    }
    outside = root / "outside"
    outside.mkdir()
    (outside / "secret").write_text("of somebody else")
    os.mkfifo(outside / "pipe")
    canaries = _state(outside)
    wanted = {name: digest(read(folder)) for name, (folder, read) in templates.items()}
    names, ways = sorted(templates), sorted(MUTATORS)
    weights = [MUTATORS[way][1] for way in ways]
    counts: collections.Counter[tuple[str, str]] = collections.Counter()
    by_way: collections.Counter[tuple[str, str]] = collections.Counter()
    faults: list[str] = []
    for number in range(args.n) if args.only is None else [int(args.only)]:
        draw = random.Random(f"{args.seed}:{number}")
        name = names[number % len(names)]
        way = draw.choices(ways, weights)[0]
        case = root / "cases" / "it"
        shutil.rmtree(case.parent, ignore_errors=True)
        shutil.copytree(templates[name][0], case)
        try:
            what = MUTATORS[way][0](draw, case)
        except (OSError, ValueError, TypeError, KeyError, IndexError) as error:
            what = f"could not be changed ({type(error).__name__})"
        kind, text = outcome(templates[name][1], case)
        if kind == "read":
            deliberate = name in INPUTS or MENDED in what or "raw JSON" in what
            same = text == wanted[name]
            kind = "equal" if same else "other, as it may" if deliberate else "fault"
            text = f"silently another: {text}" if kind == "fault" else text
        if kind == "fault":
            faults.append(f"{number} {name}, {way}, {what}: {text}")
            print(faults[-1], flush=True)
            if args.keep is not None:
                shutil.copytree(case, args.keep / str(number), symlinks=True, dirs_exist_ok=True)
        if args.only is not None:
            print(f"{name}, {way}, {what}: {kind} {text}\n{case}")
        counts[name, kind] += 1
        by_way[way, kind] += 1
        if args.only is None and (number + 1) % 1000 == 0:
            print(f"{number + 1} done, {len(faults)} faults", flush=True)
            # What is done is not lost if the rest is not run.
            pages.keep(_report(args, number + 1, faults, counts, by_way), args.output)
    if _state(outside) != canaries or pathlib.Path("/tmp/expertsteer-hostile-was-here").exists():
        faults.append("a file outside was changed, or code was run")
    if args.only is None:
        pages.show(_report(args, args.n, faults, counts, by_way), args.output)
        shutil.rmtree(root)
    sys.exit(1 if faults else 0)


Counts = collections.Counter[tuple[str, str]]


def _report(
    args: argparse.Namespace, n_done: int, faults: list[str], counts: Counts, by_way: Counts
) -> str:
    part = "" if n_done == args.n else f"the first {n_done} of "
    return "\n".join(
        [
            f"`python benchmarks/hostile_files.py --n {args.n} --seed {args.seed}`: {part}{args.n} "
            f"mutations, {len(faults)} faults; torch {torch.__version__}.",
            "",
            *_table("file", counts),
            "",
            *_table("change", by_way),
        ]
    )


def _state(folder: pathlib.Path) -> list[Any]:
    return [
        (p.name, p.stat().st_mtime_ns, p.read_bytes() if p.is_file() else b"")
        for p in sorted(folder.iterdir())
    ]


def _table(title: str, counts: Counts) -> list[str]:
    kinds = ["equal", "named", "other, as it may", "fault"]
    heads = ["read as it was", "named error", "read as what it now says", "fault"]
    rows = pages.head(title, *heads)
    for name in sorted({n for n, _ in counts}):
        rows.append(pages.row(name, *(counts[name, k] for k in kinds)))
    return rows


if __name__ == "__main__":
    main()
