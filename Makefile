# Two commands on a fresh machine: `make run` and `make test`. The package index is the only network they need.
PYTHON = python3
BIN = .venv/bin
method = adalora
ARGS =

help: ## what there is to make
	@grep -E '^[a-z]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 10

run: .venv/.installed ## one recorded run in minutes; make run method=qlora ARGS="-p rank 8"
	$(BIN)/papermill nbs/run.ipynb -p method $(method) $(ARGS)

# Notebooks and files of tests go side by side: a thread each, or they fight over the cores
test: export OMP_NUM_THREADS = 1
test: .venv/.installed ## every notebook, then every test across notebooks
	$(BIN)/nbdev_test --do_print
	$(BIN)/pytest tests -n auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder

lab: .venv/.installed ## the notebooks in JupyterLab
	$(BIN)/jupyter lab nbs/index.ipynb

install: .venv/.installed ## the tested environment, in .venv

# The stamp comes last, so that an install cut short is taken up again
.venv/.installed: settings.ini setup.py constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit("medpeft_study needs Python 3.11 or newer, and this is %d.%d: try make PYTHON=python3.12" % sys.version_info[:2] if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --constraint constraints.txt --editable '.[dev]'
	@touch $@

# reports/ first, then the pages that show it; what a record says is changed nowhere else
report: .venv/.installed ## tables, figures, claims and their pages, from the records alone
	$(BIN)/medpeft report

readme: .venv/.installed ## README.md from nbs/index.ipynb
	$(BIN)/python -m medpeft_study.site readme

docs: .venv/.installed ## the site in _docs, with Quarto or with smalldocs
	$(BIN)/medpeft docs

# each tool leaves what it found and its exit status is not ours: the last line judges all of them
KILLS = 25
FUZZ = 600
FOUND = reports/reliability.json
torture: .venv/.installed ## kills, wrong inputs and fuzz, into reports/reliability.json; quick: make torture KILLS=1 FUZZ=30 FOUND=build/quick.json
	rm -rf build/torture && mkdir -p build/torture
	-$(BIN)/python tests/torture.py --kills $(KILLS) --out build/torture/torture.json
	-$(BIN)/python tests/corpus.py --out build/torture/corpus.json
	-$(BIN)/python tests/fuzz.py --target record --seconds $(FUZZ) --out build/torture/fuzz-record.json
	-$(BIN)/python tests/fuzz.py --target dataset --seconds $(FUZZ) --out build/torture/fuzz-dataset.json
	$(BIN)/python tests/reliability.py build/torture --out $(FOUND)

audit: .venv/.installed ## what is known against the packages; offline, whether they are those of the lock
	$(BIN)/python tests/audit.py

clean: ## remove the environment and what was built, never a record
	rm -rf .venv build dist *.egg-info _proc _docs .pytest_cache .hypothesis

.PHONY: help run test torture audit lab install report readme docs clean
