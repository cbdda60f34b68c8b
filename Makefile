# make demo   the whole job on the sample blogs, with a real small model
# make test   lint and tests
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

# Nothing is written outside this folder, and nothing is reported to anybody.
export HF_HOME := $(CURDIR)/$(VENV)/cache/huggingface
export MPLCONFIGDIR := $(CURDIR)/$(VENV)/cache/matplotlib
export PIP_NO_CACHE_DIR := 1
export PIP_DISABLE_PIP_VERSION_CHECK := 1
export HF_HUB_DISABLE_TELEMETRY := 1
export DO_NOT_TRACK := 1

.PHONY: demo test
.DELETE_ON_ERROR:

$(VENV)/installed: requirements.txt
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' || \
		{ echo "Python 3.11 to 3.13 is needed: make $(MAKECMDGOALS) PYTHON=python3.12" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet -r requirements.txt
	touch $@

$(VENV)/installed-for-tests: tests/requirements.txt $(VENV)/installed
	$(BIN)/pip install --quiet -r tests/requirements.txt
	touch $@

$(VENV)/installed-for-demo: sample/requirements.txt $(VENV)/installed
	$(BIN)/pip install --quiet -r sample/requirements.txt
	touch $@

sample/model/config.json: sample/make_model.py $(VENV)/installed-for-demo
	$(BIN)/python sample/make_model.py

DEMO := sample/demo
DEMO_BLOGS := --public sample/public-blog --private sample/private-blog --author wrenlow
demo: sample/model/config.json
	$(BIN)/python extract_blog_data.py $(DEMO_BLOGS) --data-dir $(DEMO)/data
	$(BIN)/python train_model.py --base-model sample/model --data-dir $(DEMO)/data --output-dir $(DEMO)/model \
		--epochs 1 --learning-rate 2e-4
	$(BIN)/python test_model.py --data-dir $(DEMO)/data --model-dir $(DEMO)/model
	$(BIN)/python -c 'import test_model; test_model.REPORT_SIZE = 0.1; test_model.main()' \
		--data-dir $(DEMO)/data --model-dir $(DEMO)/model --report

test: $(VENV)/installed-for-tests
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python -m pytest
