# Everything sets itself up: `make demo` or `make test` on a machine with Python 3.11 and nothing else.
PYTHON ?= python3
VENV ?= .venv
VENV3 ?= .venv-tl3
# What is installed: these versions, constraints-lowest.txt, or the newest that pyproject.toml allows
# (`make test CONSTRAINTS=constraints-none.txt`).
CONSTRAINTS ?= constraints.txt
export HF_HUB_OFFLINE ?= 1
export TOKENIZERS_PARALLELISM ?= false
# Tests in parallel, one file on one worker, one thread each: tiny models gain nothing from more.
PARALLEL ?= -n auto --maxprocesses 4 --dist loadfile
BIN = $(VENV)/bin
BIN3 = $(VENV3)/bin

.DEFAULT_GOAL := help
.PHONY: help demo test doctest coverage test-tl3 test-newest check sdist notebooks notebooks-stored pictures site bench bench-one architectures sizes clean

help: ## list the targets
	@grep -E '^[a-z0-9-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

# torch first, with its pinned version: otherwise a resolver may pick a build with gigabytes of CUDA.
$(VENV)/.done: pyproject.toml $(CONSTRAINTS)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q --disable-pip-version-check -c $(CONSTRAINTS) torch
	$(BIN)/pip install -q --disable-pip-version-check -c $(CONSTRAINTS) -e '.[dev]'
	@touch $@

$(VENV3)/.done: pyproject.toml constraints.txt constraints-tl3.txt
	$(PYTHON) -m venv $(VENV3)
	$(BIN3)/pip install -q --disable-pip-version-check -c constraints-tl3.txt torch
	$(BIN3)/pip install -q --disable-pip-version-check -c constraints-tl3.txt -e '.[dev]' sae-lens
	@touch $@

demo: $(VENV)/.done ## the four steps on the bundled pair of models, under two minutes
	$(BIN)/expertsteer-lens demo

test: $(VENV)/.done ## the test suite
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(PARALLEL)

doctest: $(VENV)/.done ## the examples in docstrings
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --doctest-modules expertsteer_lens

coverage: $(VENV)/.done ## the test suite, and which lines and branches it never reaches
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(PARALLEL) --cov --cov-report=term

# In a folder of its own, so that nothing of the checkout can help.
SDIST_TESTS = test_docs test_layers test_public_api test_recipe test_tooling
sdist: $(VENV)/.done ## build the source distribution and run some of its tests where it is unpacked
	rm -rf build/sdist && mkdir -p build/sdist
	$(BIN)/pip install -q --disable-pip-version-check build
	$(BIN)/python -m build --sdist --outdir build/sdist .
	tar -xzf build/sdist/*.tar.gz -C build/sdist --strip-components 1
	cd build/sdist && PYTHONPATH=. OMP_NUM_THREADS=1 $(abspath $(BIN))/python -m pytest -m "not slow" $(SDIST_TESTS:%=tests/%.py)

TL3_TESTS = test_position_goldens test_host_transformer_lens test_host_hooked_module test_interrupts test_gates_on_hosts test_stacking \
	test_plan test_positions test_architectures test_ways_on_hosts

test-tl3: $(VENV3)/.done ## goldens, architectures and host tests with TransformerLens 3.9 (HookedTransformer, SAELens)
	OMP_NUM_THREADS=1 $(BIN3)/python -m pytest $(PARALLEL) $(TL3_TESTS:%=tests/%.py)

# Laid over the environment, so that nothing else is installed again. hqq wants termcolor.
NEWEST = 'transformers<6' torchao bitsandbytes hqq termcolor hotwire-vllm
NEWEST_TESTS = test_cache_names.py test_architectures.py test_quantised.py \
	test_ways_to_generate.py::test_a_quantised_cache_steers_as_a_hook_by_hand_does test_export.py
test-newest: $(VENV)/.done ## caches, every architecture, and quantised models, with the newest transformers that is allowed
	rm -rf build/newest
	$(BIN)/pip install -q --disable-pip-version-check --no-deps --target build/newest $(NEWEST)
	PYTHONPATH=build/newest OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(PARALLEL) $(NEWEST_TESTS:%=tests/%)

architectures: $(VENV)/.done $(VENV3)/.done ## every architecture on every host, and the table of them in the docs
	OMP_NUM_THREADS=1 $(BIN3)/python benchmarks/architectures.py --hooked build/hooked.json
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/architectures.py --hooked build/hooked.json
	$(BIN)/python benchmarks/fill_readme.py

check: $(VENV)/.done ## lint, formatting and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

notebooks: $(VENV)/.done ## execute the notebooks
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist load --nbmake --nbmake-timeout=900 notebooks

notebooks-stored: $(VENV)/.done ## execute the notebooks and keep their outputs, figures as pictures (needs Chrome)
	$(BIN)/pip install -q --disable-pip-version-check kaleido
	PLOTLY_RENDERER=png TQDM_DISABLE=1 $(BIN)/python -m pytest --nbmake --overwrite --nbmake-timeout=600 notebooks
	$(BIN)/python tools/site/tidy_notebooks.py

pictures: $(VENV)/.done ## the pictures of measured tables in the docs, drawn anew (needs Chrome)
	$(BIN)/pip install -q --disable-pip-version-check kaleido
	$(BIN)/python benchmarks/draw_pictures.py

site: $(VENV)/.done ## build the site into build/site; warnings are errors, every internal link is followed
	$(BIN)/pip install -q --disable-pip-version-check -c $(CONSTRAINTS) -e '.[docs]'
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict -q
	$(BIN)/python tools/site/check_links.py build/site

bench: $(VENV)/.done ## the offline benchmark and the speed benchmarks (installs xrfm)
	$(BIN)/expertsteer-lens bench
	$(BIN)/pip install -q --disable-pip-version-check -c $(CONSTRAINTS) xrfm
	$(BIN)/python benchmarks/rfm_speed.py
	$(BIN)/python benchmarks/mi_speed.py --repeats 3

bench-one: $(VENV)/.done ## the offline benchmark on one domain, without its studies
	OMP_NUM_THREADS=1 $(BIN)/expertsteer-lens bench --domain mathematics --no-studies

sizes: ## lines per file and per room
	@wc -l expertsteer_lens/*.py expertsteer_lens/*/*.py | sort -n

clean: ## remove environments and caches
	rm -rf $(VENV) $(VENV3) .pytest_cache .mypy_cache .ruff_cache
