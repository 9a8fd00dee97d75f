# Everything a user needs: set-up, the demo, the tests. `make demo` works on a bare machine with
# Python 3.11.
PYTHON ?= python3
VENV ?= .venv
RUNS ?= runs
ORACLE ?= .oracle
RUN = $(VENV)/bin/python
# pytest in two processes of one thread each, a file of tests in one of them
IN_TWO = OMP_NUM_THREADS=1 $(RUN) -m pytest --numprocesses 2 --dist loadfile
# the versions with which everything passed; `make test-newest` does without
CONSTRAINTS ?= --constraint constraints.txt
NEWEST = .venv-newest
# the release of ultralytics that `make parity` compares with beside three older ones, and that the
# benchmarks measure; raise it once `make parity PEER=...` has passed
PEER ?= 8.4.190

.PHONY: setup demo test test-newest constraints faults long cuda parity bench lint

setup: $(VENV)/.installed

# torch comes in its CUDA build, which runs on CPUs too: torchvision's compiled operators do not
# load beside a CPU-only torch
$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --upgrade pip
	$(RUN) -m pip install --quiet $(CONSTRAINTS) --editable '.[dev,plots,tb,export,sweep]' || { \
		echo 'a version in constraints.txt cannot be had here: installing the newest of everything'; \
		$(RUN) -m pip install --quiet --editable '.[dev,plots,tb,export,sweep]'; }
	touch $@

# generated shapes, a teacher (YOLO11s), a student distilled from it (YOLO11n), one table of both,
# and pictures
demo: setup
	$(RUN) -m examples.shapes --root data/shapes
	rm -rf $(RUNS)/demo_teacher $(RUNS)/demo
	$(RUN) train.py --config configs/demo.yaml run=$(RUNS)/demo_teacher \
		student.scale=s teacher=null distill=null
	$(RUN) train.py --config configs/demo.yaml run=$(RUNS)/demo \
		teacher.weights=$(RUNS)/demo_teacher/best.pt
	$(RUN) eval.py --config $(RUNS)/demo/config.yaml --weights $(RUNS)/demo/best.pt --teacher
	$(RUN) -m kdmini.tools.visualize $(RUNS)/demo

test: setup
	$(IN_TWO) --ignore tests/faults -m 'not parity and not long and not cuda'

# the same with the newest version of every package, in an environment of its own that is made anew
test-newest:
	rm -rf $(NEWEST)
	$(MAKE) test VENV=$(NEWEST) CONSTRAINTS=

# what `make test-newest` has just passed with becomes constraints.txt; wheels of one platform alone
# are left out
constraints: test-newest
	$(NEWEST)/bin/python -m pip install --quiet --editable '.[parity]'
	$(NEWEST)/bin/python -m pip freeze --exclude-editable | grep -vE '^(nvidia|cuda|triton)' > constraints.txt

# everything that can go wrong, the long tests included; writes the table of docs/survives.md
faults: setup
	$(IN_TWO) tests/faults

# the demo from end to end and as a notebook, a detector that has to overfit sixteen photographs, and
# what is asked of a GPU asked of the CPU
long: setup
	$(IN_TWO) --dist worksteal tests/long tests/bench/test_first_gpu.py

# train.py on a CUDA card that is pretended, by a machine without one; needs g++
cuda: setup
	$(RUN) -m pytest tests/cuda

parity: setup $(ORACLE)/.installed
	KDMINI_ORACLE=$(ORACLE) $(RUN) -m pytest -m parity

# the references (ultralytics is AGPL-3.0) are compared with, never used: each stays in a folder of its own, outside
# the environment and without its dependencies
$(ORACLE)/.installed: pyproject.toml Makefile
	$(RUN) -m pip install --quiet $(CONSTRAINTS) --editable '.[dev,parity]'
	for version in 8.3.0 8.3.250 8.4.0; do \
		$(RUN) -m pip install --quiet --upgrade --target $(ORACLE)/$$version --no-deps \
			ultralytics==$$version ultralytics-thop py-cpuinfo || exit 1; \
	done
	$(RUN) -m pip install --quiet --upgrade --target $(ORACLE)/newest --no-deps \
		ultralytics==$(PEER) ultralytics-thop py-cpuinfo
	$(RUN) -m pip install --quiet --upgrade --target $(ORACLE)/torchdistill --no-deps torchdistill==1.1.5
	$(RUN) -m pip install --quiet --upgrade --target $(ORACLE)/object-detection-metrics --no-deps \
		object-detection-metrics==0.4.post1 shapely
	$(RUN) -m pip install --quiet --upgrade --target $(ORACLE)/torchmetrics --no-deps \
		torchmetrics==1.9.0 lightning-utilities
	$(RUN) -m pip install --quiet --upgrade --target $(ORACLE)/transformers --no-deps transformers==5.24.0 \
		tokenizers regex huggingface-hub httpx2 httpcore2 h11 truststore
	$(RUN) -m pip install --quiet --upgrade --target $(ORACLE)/timm --no-deps timm==1.0.31
	touch $@

# what things cost, beside the references if `make parity` has installed them: a quarter of an hour
bench: setup
	for part in complexity loader evaluation terms full step; do \
		PYTHONPATH=$(ORACLE)/newest $(RUN) -m bench.$$part || exit 1; \
	done

lint: setup
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
