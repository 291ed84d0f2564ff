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
import io
import json
import os
import pathlib
import pickle
import random
import resource
import select
import shutil
import signal
import struct
import sys
import tempfile
import time
import traceback
import zipfile
from collections.abc import Callable
from typing import Any

import torch

import expertsteer_lens as esl
from expertsteer_lens._checked_json import digest_of
from expertsteer_lens.benchmarks import public
from expertsteer_lens.cli.io import read_config, read_texts
from expertsteer_lens.data.contrast import Behaviour, ContrastPairs
from expertsteer_lens.errors import ExpertSteerError
from expertsteer_lens.files.kinds import kind_of

SECONDS, MEMORY = 5.0, 2**30
Mutator = Callable[[random.Random, pathlib.Path], str]


# -- what is read ---------------------------------------------------------------------------------


def make_templates(root: pathlib.Path) -> dict[str, tuple[pathlib.Path, Callable[[Any], Any]]]:
    """A folder of each kind, and what reads it."""
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
    found: dict[str, tuple[pathlib.Path, Callable[[Any], Any]]] = {}
    for name, thing in things.items():
        found[name] = (esl.save(thing, root / name / "it"), esl.load)
    store = root / "states in a folder" / "it"
    esl.capture(target, pairs.texts, hooks, labels=pairs.labels, positions="mean", store=store)
    found["states in a folder"] = (store, esl.load)

    rows = [
        {"positive": p, "negative": n} for p, n in zip(pairs.positive, pairs.negative, strict=True)
    ]
    questions = [
        {"question": f"What is {i}?", "choices": ["a", f"b{i}"], "answer": i % 2} for i in range(9)
    ]
    inputs: dict[str, tuple[str, bytes, Callable[[pathlib.Path], Any]]] = {
        "pairs": ("a.jsonl", _lines(rows), ContrastPairs.from_jsonl),
        "behaviour": (
            "a.json",
            json.dumps(
                {
                    "prompts": behaviour.prompts,
                    "positive": behaviour.positive,
                    "negative": behaviour.negative,
                }
            ).encode(),
            Behaviour.from_json,
        ),
        "anchors": ("a.txt", "\n".join(anchors).encode(), read_texts),
        "chats": (
            "a.jsonl",
            _lines([[{"role": "user", "content": a}] for a in anchors]),
            read_texts,
        ),
        "settings": (
            "a.json",
            json.dumps(steps.config.to_dict()).encode(),
            lambda path: read_config(path, "anchored"),
        ),
        "benchmark": (
            "a.jsonl",
            _lines(questions),
            lambda path: public.load("mmlu_anatomy", path=path),
        ),
        "benchmark, table": (
            "a.csv",
            ("question,choices,answer\n" + "\n".join(
                f'"{q["question"]}","[""a"", ""{q["choices"][1]}""]",{q["answer"]}'
                for q in questions
            )).encode(),
            lambda path: public.load("mmlu_anatomy", path=path),
        ),
    }  # fmt: skip
    for name, (file, content, read) in inputs.items():
        folder = root / name / "it"
        folder.mkdir(parents=True)
        (folder / file).write_bytes(content)
        found[name] = (folder, _reading(file, read))
    for name, file in (("vector, gguf", "a.gguf"), ("vector, torch", "a.pt")):
        folder = root / name / "it"
        folder.mkdir(parents=True)
        if file == "a.gguf":
            to_gguf(plan, folder / file)
        else:
            torch.save({int(k.split(".")[1]): torch.ones(8) for k in hooks}, folder / file)
        found[name] = (
            folder,
            _reading(file, esl.SteeringPlan.from_foreign),
        )
    return found


INPUTS = (
    "pairs", "behaviour", "anchors", "chats", "settings", "benchmark", "benchmark, table",
    "vector, gguf", "vector, torch",
)  # fmt: skip
"""Files of others, without checksums of ours: changed content is read as it stands."""


def _reading(file: str, read: Callable[[pathlib.Path], Any]) -> Callable[[Any], Any]:
    return lambda folder: read(pathlib.Path(folder) / file)


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


# -- how files are changed ------------------------------------------------------------------------


def _file(draw: random.Random, folder: pathlib.Path, ending: str = "") -> pathlib.Path:
    files = sorted(p for p in folder.iterdir() if p.name.endswith(ending) and p.name != "README.md")
    return draw.choice(files or sorted(folder.iterdir()))


def truncated(draw: random.Random, folder: pathlib.Path) -> str:
    file = _file(draw, folder)
    data = file.read_bytes()
    file.write_bytes(data[: draw.choice([0, 1, 7, 8, draw.randrange(len(data)), len(data) - 1])])
    return f"{file.name} truncated"


def bit_flipped(draw: random.Random, folder: pathlib.Path) -> str:
    file = _file(draw, folder)
    data = bytearray(file.read_bytes())
    for _ in range(draw.choice([1, 1, 1, 5])):
        # Headers are short beside tensors: half of the flips go there.
        at = (
            draw.randrange(min(len(data), 400))
            if draw.random() < 0.5
            else draw.randrange(len(data))
        )
        data[at] ^= 1 << draw.randrange(8)
    file.write_bytes(bytes(data))
    return f"{file.name} bits flipped"


def bytes_replaced(draw: random.Random, folder: pathlib.Path) -> str:
    file = _file(draw, folder)
    data = bytearray(file.read_bytes())
    at, n = draw.randrange(len(data)), draw.choice([1, 4, 40])
    data[at : at + n] = draw.choice(
        [b"\0" * n, b"", draw.randbytes(n), b"\xff\xfe", b"{", b"\xed\xa0\x80"]
    )
    file.write_bytes(bytes(data))
    return f"{file.name} bytes replaced"


def digit_changed(draw: random.Random, folder: pathlib.Path) -> str:
    file = _file(draw, folder, ".json")
    data = bytearray(file.read_bytes())
    places = [i for i, b in enumerate(data) if 48 <= b <= 57]
    if places:
        data[draw.choice(places)] = draw.randrange(48, 58)
    file.write_bytes(bytes(data))
    return f"{file.name} digit changed"


def removed(draw: random.Random, folder: pathlib.Path) -> str:
    file = _file(draw, folder)
    file.unlink()
    if draw.random() < 0.5:
        file.mkdir()
    return f"{file.name} removed"


def linked(draw: random.Random, folder: pathlib.Path) -> str:
    file, outside = _file(draw, folder), folder.parent.parent / "outside"
    file.unlink()
    where = draw.choice(
        [outside / "secret", outside, file, pathlib.Path("/dev/zero"), pathlib.Path("/etc/passwd"),
         pathlib.Path("/proc/self/mem"), outside / "nothing", outside / "pipe"]
    )  # fmt: skip
    file.symlink_to(where)
    return f"{file.name} is a link"


def disguised(draw: random.Random, folder: pathlib.Path) -> str:
    """A pickle, a zip of torch.save, a gzip in place of a file."""
    file = _file(draw, folder)
    stream = io.BytesIO()
    kind = draw.choice(["pickle", "torch", "zip", "gzip", "parquet"])
    if kind == "pickle":
        pickle.dump(_Runs(), stream)
    elif kind == "torch":
        torch.save({"a": _Runs()}, stream)
    elif kind == "zip":
        with zipfile.ZipFile(stream, "w") as archive:
            archive.writestr("../../outside/secret", b"x" * 100)
            archive.writestr("archive/data.pkl", pickle.dumps(_Runs()))
    else:
        stream.write({"gzip": b"\x1f\x8b\x08", "parquet": b"PAR1"}[kind] + draw.randbytes(200))
    file.write_bytes(stream.getvalue())
    _mend(folder, draw)
    return f"{file.name} is a {kind}"


class _Runs:
    def __reduce__(self) -> Any:
        return os.system, ("touch /tmp/expertsteer-hostile-was-here",)


def header_changed(draw: random.Random, folder: pathlib.Path) -> str:
    """The header of a safetensors file: its length lies, it is huge, its offsets overlap, types and
    shapes are others."""
    file = _file(draw, folder, ".safetensors")
    data = file.read_bytes()
    if not file.name.endswith(".safetensors") or len(data) < 9:
        return truncated(draw, folder)
    length = struct.unpack("<Q", data[:8])[0]
    head, body = data[8 : 8 + length], data[8 + length :]
    way = draw.choice(["length", "huge", "offsets", "type", "shape", "deep", "twice", "many"])
    if way == "length":
        size = draw.choice([0, 1, length - 1, length + 1, 2**32, 2**63, 2**64 - 1, 10**9])
        file.write_bytes(struct.pack("<Q", size) + head + body)
    else:
        content = json.loads(head)
        names = [n for n in content if n != "__metadata__"] or ["x"]
        entry = content.get(draw.choice(names), {})
        if way == "huge":
            content["__metadata__"] = {"x": "y" * draw.choice([10**6, 10**7])}
        elif way == "offsets":
            entry["data_offsets"] = draw.choice([[0, 2**60], [-1, 4], [8, 0], [0, 4], ["0", "4"]])
        elif way == "type":
            entry["dtype"] = draw.choice(["I8", "F64", "F8_E4M3", "BF16", "BOOL", "X", 3, "U64"])
        elif way == "shape":
            entry["shape"] = draw.choice([[2**40], [-1], [], [0], [1] * 300, "3", [2**62, 4], None])
        elif way == "many":
            content |= {
                f"z{i}": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for i in range(3000)
            }
        text = json.dumps(content)
        if way == "deep":
            text = text[:-1] + ',"q":' + "[" * 3000 + "]" * 3000 + "}"
        elif way == "twice":
            text = text[:-1] + f",{json.dumps(names[0])}:" + json.dumps(entry) + "}"
        raw = text.encode()
        file.write_bytes(struct.pack("<Q", len(raw)) + raw + body)
    mended = _mend(folder, draw)
    return f"{file.name} header, {way}{mended}"


def json_changed(draw: random.Random, folder: pathlib.Path) -> str:
    """A value of a JSON file is of another type, deeply nested, huge, NaN, a path, ..."""
    file = _file(draw, folder, ".json")
    if not file.name.endswith((".json", ".jsonl")):
        return bytes_replaced(draw, folder)
    lines = file.read_text(encoding="utf-8").split("\n") if file.name.endswith("l") else None
    number = 0 if lines is None else draw.randrange(len(lines))
    content = json.loads(file.read_text(encoding="utf-8") if lines is None else lines[number])
    places = list(_places(content))
    way = "another value"
    new = draw.choice(_VALUES)
    if places and draw.random() < 0.9:
        parent, key = draw.choice(places)
        chance = draw.random()
        if chance < 0.6:
            parent[key] = new
        elif chance < 0.75 and isinstance(parent, dict):
            parent[draw.choice(_KEYS)] = new
            way = "a key more"
        elif chance < 0.85:
            del parent[key]
            way = "a key less"
        else:
            other, there = draw.choice(places)
            parent[key] = json.loads(json.dumps(other[there])) if there in _keys(other) else new
            way = "a value from elsewhere"
    else:
        content = new
    if isinstance(content, dict) and "content_sha256" in content and draw.random() < 0.7:
        way += ", checksum mended"
        try:
            content["content_sha256"] = digest_of(content)
        except (ValueError, RecursionError):
            content.pop("content_sha256")
    text = json.dumps(content)
    raw = draw.choice(_RAW)
    if raw and '"@raw@"' not in text and draw.random() < 0.25:
        at = text.find(":", draw.randrange(len(text)))
        if at > 0:
            text, way = text[: at + 1] + raw + "," + text[at + 1 :].split(",", 1)[-1], "raw JSON"
            text = text if draw.random() < 0.5 else text.replace('"content_sha256"', '"x"')
    if draw.random() < 0.06 and text.startswith("{") and len(text) > 2:
        text, way = text[:-1] + "," + text[1:], "every key twice"
    if lines is not None:
        lines[number] = text
        text = "\n".join(lines)
    file.write_text(text, encoding="utf-8", errors="surrogatepass")
    return f"{file.name}: {way}"


_VALUES: list[Any] = [
    None, True, False, 0, -1, 1, 2**31, 2**63, 10**30, -(10**30), 0.5, -0.0, 1e308, "", "x", "\ud800",
    "\u2028", "../../outside/secret", "/etc/passwd", "\x1b[2J", "x" * 10**5, [], {}, [[]], [None], [0] * 1000,
    {"$tensor": 0}, {"$tensor": 10**9}, {"$tensor": -1}, {"$tensor": None}, {"$tensor": [0]},
    {"$class": "Path", "fields": {}}, {"$class": "RFM", "fields": {}}, {"$class": ["RFM"], "fields": {}},
    {"$class": "ExpertSteering", "fields": {"config": 1}}, {"$float": "nan"}, {"$float": "inf"}, {"$float": 1},
    {"$float": ["nan"]}, {"$tuple": 3}, {"$tuple": []}, {"$items": [[1]]}, {"$items": [[[], 1]]},
    {"$items": [["a", 1], ["a", 2]]}, {"$model": {}}, {"$model": 3}, {"$unknown": 1},
    {"$class": "os.system", "fields": {"command": "true"}}, {"a": {"b": {"c": 1}}}, "nan", "inf", "1e999",
    "{}" * 50, [1, "a", None], {"": 0}, {"__class__": "x"}, 1.5, "0", "blocks.9999.hook_resid_post", "blocks.-1.",
]  # fmt: skip
_KEYS = ["", "x", "$tensor", "$class", "fields", "__proto__", "format_version", "kind", "a" * 1000]
_RAW = ["NaN", "Infinity", "-Infinity", "1e999", "1" * 5000, "[" * 2000 + "]" * 2000, "[" * 10**5,
        '{"a":' * 3000 + "1" + "}" * 3000, '"\\ud800"', "'x'", "01", "1,", "// x\n1"]  # fmt: skip


def version_changed(draw: random.Random, folder: pathlib.Path) -> str:
    """Files of the future and of the past."""
    for name in ("config.json", "index.json"):
        file = folder / name
        if file.is_file():
            content = json.loads(file.read_text(encoding="utf-8"))
            content[draw.choice(["format_version", "kind", "format"])] = draw.choice(
                [
                    0,
                    1,
                    2,
                    3,
                    99,
                    -1,
                    True,
                    1.0,
                    "2",
                    None,
                    [2],
                    "ExpertSteering",
                    "RFM",
                    "Future",
                    {},
                ]
            )
            content["content_sha256"] = digest_of(content)
            file.write_text(json.dumps(content), encoding="utf-8")
            return "version or kind, checksum mended"
    return bit_flipped(draw, folder)


def swapped(draw: random.Random, folder: pathlib.Path) -> str:
    """A file of another saved thing."""
    file = _file(draw, folder)
    others = [
        p
        for p in (folder.parent.parent / "templates").glob("*/it/*")
        if p.suffix == file.suffix and p.read_bytes() != file.read_bytes()
    ]
    if not others:
        return truncated(draw, folder)
    file.write_bytes(draw.choice(sorted(others)).read_bytes())
    return f"{file.name} of another{_mend(folder, draw)}"


MUTATORS: dict[str, tuple[Mutator, float]] = {
    "truncation": (truncated, 1),
    "bit flips": (bit_flipped, 2),
    "bytes replaced": (bytes_replaced, 1.5),
    "digit changed": (digit_changed, 1),
    "missing, folder in its place": (removed, 0.3),
    "links, devices, pipes": (linked, 0.4),
    "pickles and archives in disguise": (disguised, 0.7),
    "headers of tensor files": (header_changed, 1.5),
    "JSON: types, nesting, duplicates, NaN, paths": (json_changed, 4),
    "other versions and kinds": (version_changed, 0.4),
    "files of another result": (swapped, 0.5),
}
_MENDED = "checksum mended"


def _mend(folder: pathlib.Path, draw: random.Random) -> str:
    """Make the checksums fit again, half of the time, as somebody who means harm would."""
    if draw.random() < 0.5:
        return ""
    file = folder / "config.json"
    try:
        if file.is_file():
            config = json.loads(file.read_text(encoding="utf-8"))
            for tensors in folder.glob("*.safetensors"):
                config[f"{tensors.stem}_sha256"] = hashlib.sha256(tensors.read_bytes()).hexdigest()
        else:
            file = folder / "index.json"
            config = json.loads(file.read_text(encoding="utf-8"))
            names = config["key"]["hook_names"]
            for i, name in enumerate(names):
                raw = (folder / f"states-{i:03d}.safetensors").read_bytes()
                config["sha256"][name] = hashlib.sha256(raw).hexdigest()
        config["content_sha256"] = digest_of(config)
        file.write_text(json.dumps(config), encoding="utf-8")
    except (OSError, ValueError, KeyError, TypeError, IndexError):
        return ""
    return f", {_MENDED}"


def _places(content: Any) -> Any:
    for key in _keys(content):
        yield content, key
        yield from _places(content[key])


def _keys(content: Any) -> list[Any]:
    if isinstance(content, dict):
        return list(content)
    return list(range(len(content))) if isinstance(content, list) else []


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
    templates = make_templates(root / "templates")
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
            deliberate = name in INPUTS or _MENDED in what or "raw JSON" in what
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
        if number % 1000 == 999:
            print(f"{number + 1} done, {len(faults)} faults", flush=True)
    if _state(outside) != canaries or pathlib.Path("/tmp/expertsteer-hostile-was-here").exists():
        faults.append("a file outside was changed, or code was run")
    report = "\n".join(
        [
            f"`python benchmarks/hostile_files.py --n {args.n} --seed {args.seed}`: {args.n} "
            f"mutations, {len(faults)} faults; torch {torch.__version__}.",
            "",
            *_table("file", counts),
            "",
            *_table("change", by_way),
        ]
    )
    print(report)
    if args.output is not None and args.only is None:
        args.output.write_text(report + "\n", encoding="utf-8")
    if args.only is None:
        shutil.rmtree(root)
    sys.exit(1 if faults else 0)


def _state(folder: pathlib.Path) -> list[Any]:
    return [
        (p.name, p.stat().st_mtime_ns, p.read_bytes() if p.is_file() else b"")
        for p in sorted(folder.iterdir())
    ]


def _table(title: str, counts: collections.Counter[tuple[str, str]]) -> list[str]:
    kinds = ["equal", "named", "other, as it may", "fault"]
    heads = ["read as it was", "named error", "read as what it now says", "fault"]
    rows = [f"| {title} | {' | '.join(heads)} |", "|---" * (len(kinds) + 1) + "|"]
    for name in sorted({n for n, _ in counts}):
        rows.append(f"| {name} | " + " | ".join(str(counts[name, k]) for k in kinds) + " |")
    return rows


if __name__ == "__main__":
    main()
