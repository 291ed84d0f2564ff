"""How `hostile_files.py` changes a file in a folder: each function changes one and says what it did."""

from __future__ import annotations

import hashlib
import io
import json
import os
import pathlib
import pickle
import random
import struct
import zipfile
from collections.abc import Callable
from typing import Any

import torch

from expertsteer_lens._checked_json import digest_of

Mutator = Callable[[random.Random, pathlib.Path], str]


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
MENDED = "checksum mended"


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
    return f", {MENDED}"


def _places(content: Any) -> Any:
    for key in _keys(content):
        yield content, key
        yield from _places(content[key])


def _keys(content: Any) -> list[Any]:
    if isinstance(content, dict):
        return list(content)
    return list(range(len(content))) if isinstance(content, list) else []
