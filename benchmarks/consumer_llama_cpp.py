"""A control vector of ours in llama.cpp itself: its logits beside `plan.hooks`.

The libraries of llama.cpp, built for Linux, are in a package of the npm registry:

    npm pack @node-llama-cpp/linux-x64 && tar -xzf node-llama-cpp-linux-x64-*.tgz
    python benchmarks/consumer_llama_cpp.py --libraries package/bins/linux-x64

The file is read by llama.cpp's own `common_control_vector_load`, as `--control-vector FILE` reads
it. A tiny random Llama in float32; writes `benchmarks/results/consumer_llama_cpp.json`.
"""

from __future__ import annotations

import argparse
import ctypes as c
import json
import pathlib
import sys
import tempfile

import pages

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))

import tiny_gguf  # noqa: E402
import torch  # noqa: E402

import expertsteer_lens as esl  # noqa: E402

LOAD = "_Z26common_control_vector_loadRKSt6vectorI31common_control_vector_load_infoSaIS0_EE"
PROMPTS = ([1, 7, 12, 30, 5], [1, 20, 21], [9, 10, 11, 12, 13, 14, 15], [250])


class Opaque(c.Structure):
    """Parameters that are handed on as they come; larger than any version of them."""

    _fields_ = (("bytes", c.c_char * 1024),)


class Batch(c.Structure):
    _fields_ = (("n_tokens", c.c_int32), *((f"p{i}", c.c_void_p) for i in range(6)))


class String(c.Structure):
    """std::string of libstdc++."""

    _fields_ = (("text", c.c_char_p), ("size", c.c_size_t), ("local", c.c_char * 16))


class LoadInfo(c.Structure):
    _fields_ = (("strength", c.c_float), ("name", String))


class Vector(c.Structure):
    """std::vector: begin, end, end of what is allocated."""

    _fields_ = (("begin", c.c_void_p), ("end", c.c_void_p), ("limit", c.c_void_p))


class Loaded(c.Structure):
    _fields_ = (("n_embd", c.c_int), ("data", Vector))


def libraries(folder: pathlib.Path) -> tuple[c.CDLL, c.CDLL]:
    found = {p.name.split(".")[0]: p for p in folder.glob("lib*.so*")}
    for name in ("libggml-base", "libggml"):
        ggml = c.CDLL(str(found[name]), mode=c.RTLD_GLOBAL)
    ggml.ggml_backend_load_all_from_path(c.c_char_p(str(folder).encode()))
    lib = c.CDLL(str(found["libllama"]), mode=c.RTLD_GLOBAL)
    for name in ("model_default_params", "context_default_params"):
        getattr(lib, f"llama_{name}").restype = Opaque
    for name in ("model_load_from_file", "init_from_model", "model_get_vocab", "get_memory"):
        getattr(lib, f"llama_{name}").restype = c.c_void_p
    lib.llama_model_load_from_file.argtypes = (c.c_char_p, Opaque)
    lib.llama_init_from_model.argtypes = (c.c_void_p, Opaque)
    lib.llama_model_get_vocab.argtypes = (c.c_void_p,)
    lib.llama_vocab_n_tokens.argtypes = (c.c_void_p,)
    lib.llama_get_memory.argtypes = (c.c_void_p,)
    lib.llama_memory_clear.argtypes = (c.c_void_p, c.c_bool)
    lib.llama_batch_get_one.restype = Batch
    lib.llama_batch_get_one.argtypes = (c.c_void_p, c.c_int32)
    lib.llama_decode.argtypes = (c.c_void_p, Batch)
    lib.llama_get_logits_ith.restype = c.POINTER(c.c_float)
    lib.llama_get_logits_ith.argtypes = (c.c_void_p, c.c_int32)
    lib.llama_set_adapter_cvec.argtypes = (
        c.c_void_p, c.c_void_p, c.c_size_t, c.c_int32, c.c_int32, c.c_int32,
    )  # fmt: skip
    lib.llama_backend_init()
    return lib, c.CDLL(str(found["libllama-common"]))


def read(common: c.CDLL, file: pathlib.Path) -> Loaded:
    """The control vector as llama.cpp's own loader reads it."""
    text = str(file).encode()
    one = (LoadInfo * 1)(LoadInfo(1.0, String(text, len(text))))
    where = c.addressof(one)
    asked = Vector(where, where + c.sizeof(one), where + c.sizeof(one))
    load = getattr(common, LOAD)
    load.restype, load.argtypes = Loaded, (c.POINTER(Vector),)
    return load(c.byref(asked))


class Run:
    """One model in llama.cpp."""

    def __init__(self, lib: c.CDLL, file: pathlib.Path, n_layers: int) -> None:
        self.lib, self.n_layers = lib, n_layers
        self.model = lib.llama_model_load_from_file(
            str(file).encode(), lib.llama_model_default_params()
        )
        self.context = lib.llama_init_from_model(self.model, lib.llama_context_default_params())
        self.n_vocab = lib.llama_vocab_n_tokens(lib.llama_model_get_vocab(self.model))

    def steer(self, loaded: Loaded) -> None:
        n = (loaded.data.end - loaded.data.begin) // 4
        failed = self.lib.llama_set_adapter_cvec(
            self.context, loaded.data.begin, n, loaded.n_embd, 1, self.n_layers
        )
        assert failed == 0

    def logits(self) -> torch.Tensor:
        out = []
        for prompt in PROMPTS:
            self.lib.llama_memory_clear(self.lib.llama_get_memory(self.context), True)
            ids = (c.c_int32 * len(prompt))(*prompt)
            batch = self.lib.llama_batch_get_one(c.addressof(ids), len(prompt))
            assert self.lib.llama_decode(self.context, batch) == 0
            found = self.lib.llama_get_logits_ith(self.context, -1)
            out.append(torch.tensor(found[: self.n_vocab]))
        return torch.stack(out)


@torch.no_grad()
def ours(model) -> torch.Tensor:
    return torch.stack([model(torch.tensor([p])).logits[0, -1] for p in PROMPTS])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--libraries", type=pathlib.Path, required=True)
    folder = parser.parse_args().libraries.resolve()
    n_layers = 4
    with tempfile.TemporaryDirectory() as name:
        work = pathlib.Path(name)
        model = tiny_gguf.write(work / "tiny.gguf", n_layers=n_layers, size=0.15)
        generator = torch.Generator().manual_seed(0)
        vectors = {
            f"blocks.{i}.hook_resid_post": torch.randn(32, generator=generator) for i in (1, 2)
        }
        plan = esl.SteeringPlan.from_vectors(vectors, coefficient=3.0, relative_to="unit")
        shifted = esl.SteeringPlan.from_vectors(
            {f"blocks.{i + 1}.hook_resid_post": v for i, v in enumerate(vectors.values(), 1)},
            coefficient=3.0,
            relative_to="unit",
        )
        esl.export.to_gguf(plan, work / "plan.gguf")
        lib, common = libraries(folder)
        run = Run(lib, work / "tiny.gguf", n_layers)
        plain, own = run.logits(), ours(model)
        run.steer(read(common, work / "plan.gguf"))
        steered = run.logits()
        with plan.hooks(model):
            wanted = ours(model)
        with shifted.hooks(model):
            elsewhere = ours(model)

    def alike(a: torch.Tensor, b: torch.Tensor) -> float:
        return float(torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1])

    metadata = json.loads((folder / "_nlcBuildMetadata.json").read_text())["buildOptions"]
    result = {
        "n_logits": wanted.numel(),
        "max_difference_steered": float((steered - wanted).abs().max()),
        "max_difference_plain": float((plain - own).abs().max()),
        "max_effect": float((wanted - own).abs().max()),
        "correlation_of_effects": alike(steered - plain, wanted - own),
        "correlation_if_a_layer_later": alike(steered - plain, elsewhere - own),
        "versions": {"llama.cpp": metadata["llamaCpp"]["release"], "torch": torch.__version__},
    }
    pages.show_numbers(result, "consumer_llama_cpp")


if __name__ == "__main__":
    main()
