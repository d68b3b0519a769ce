# Commands of the course. Each makes .venv and installs what it needs on first use.
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.installed

.PHONY: help lab run test promote refresh clean

help: ## show this list
	@grep -hE '^[a-z]+:.*## ' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 12

lab: $(READY) ## open the course in JupyterLab
	$(BIN)/python -m jupyterlab

run: $(READY) ## execute every notebook in order (outputs go to build/) and print the table of results
	$(BIN)/python tests/run_notebooks.py

test: $(READY) ## verify everything: lint, promotion, tests, every notebook's stored outputs
	$(BIN)/python tests/verify.py

promote: $(READY) ## write shared/ from the notebook cells tagged promote:<module>
	$(BIN)/python tests/promote.py

refresh: $(READY) ## rewrite the stored outputs of all notebooks, or of NB=path/to/notebook.ipynb
	$(BIN)/python tests/promote.py
	$(BIN)/python tests/run_notebooks.py --write $(NB)

clean: ## remove the virtual environment and everything that a run left behind
	rm -rf .venv build llm_in_notebooks.egg-info .ruff_cache .hypothesis

$(READY): requirements.txt constraints.txt pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt -c constraints.txt
	@touch $(READY)
