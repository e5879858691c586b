# Each target is one line over the console command `mixmask`; `make help` lists them.
# PYTHON= chooses the interpreter that makes the environment, VENV= an environment that you already have.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.mixmask-installed
MIXMASK := $(BIN)/mixmask

# What the targets work on; override on the command line: make pretrain CONFIG=… ARGS="data.root=/data/cifar100 epochs=200"
CONFIG ?= configs/pretrain/cifar100_moco_mixmask.yaml
BACKBONE ?= backbone.safetensors
SOURCE ?= $(BACKBONE)
OUT ?= backbone.pkl
TO ?= detectron2
LABELS ?= 1
ENGINE ?= torchvision
SEEDS ?= 0 1 2 3 4
SCHEDULE ?= 1x
COCO_2x := _2x
SUITE ?= configs/suites/demo.yaml
CLUSTER ?= slurm
PROFILE ?=
RUNS ?= runs
FORMAT ?= term
REPORT ?= report
DEMO ?= demo
ARGS ?=
# Processes that tests are shared out to
JOBS ?= 3

.DEFAULT_GOAL := help
.PHONY: help install demo test test-quick lint pretrain inspect convert knn linear semisup detect-voc detect-coco segment show-detections suite status tables report plots verify reference bench bench-gpu docs pictures doctor

help: ## List the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

install: $(READY) ## Make the environment and install the project into it

$(READY): pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[dev]'
	@touch $(READY)
	@echo "installed into $(VENV); activate it with: . $(BIN)/activate"

demo: $(READY) ## Pretrain, convert, transfer, tabulate on synthetic pictures (about ten minutes on two cores)
	$(MIXMASK) demo $(ARGS)

test: $(READY) ## Run the tests
	$(BIN)/python -m pytest -n $(JOBS) --dist loadgroup $(ARGS)

test-quick: $(READY) ## The tests that take seconds: no SLURM, no browser, no TeX
	$(BIN)/python -m pytest -n $(JOBS) --dist loadgroup -m "not slow and not real" $(ARGS)

lint: $(READY) ## Formatting, lint, types, and the three floors
	$(BIN)/ruff format --check . && $(BIN)/ruff check . && $(BIN)/mypy && $(BIN)/lint-imports

pretrain: $(READY) ## Pretrain a backbone: CONFIG=… ARGS="data.root=… key=value"
	$(MIXMASK) pretrain $(CONFIG) --runs $(RUNS) $(ARGS)

inspect: $(READY) ## What a checkpoint holds: SOURCE=…
	$(MIXMASK) inspect $(SOURCE) $(ARGS)

convert: $(READY) ## Convert a checkpoint: SOURCE=… OUT=… TO=detectron2|torchvision|timm|mixmask
	$(MIXMASK) convert $(SOURCE) $(OUT) --to $(TO) $(ARGS)

knn: $(READY) ## kNN accuracy: BACKBONE=… ARGS="data.root=…"
	$(MIXMASK) transfer configs/transfer/knn.yaml backbone=$(BACKBONE) --runs $(RUNS) $(ARGS)

linear: $(READY) ## Linear probe: BACKBONE=… ARGS="data.root=…"
	$(MIXMASK) transfer configs/transfer/linear.yaml backbone=$(BACKBONE) --runs $(RUNS) $(ARGS)

semisup: $(READY) ## Finetune on a share of the labels: LABELS=1|10|100 BACKBONE=… ARGS="data.root=…"
	$(MIXMASK) transfer configs/transfer/semisup_$(LABELS).yaml backbone=$(BACKBONE) --runs $(RUNS) $(ARGS)

detect-voc: $(READY) ## Faster R-CNN on VOC, five seeds: BACKBONE=… ENGINE=torchvision|detectron2 SEEDS="0 1" ARGS="data.root=…"
	set -e; for seed in $(SEEDS); do $(MIXMASK) transfer configs/transfer/detect_voc.yaml backbone=$(BACKBONE) \
		engine=$(ENGINE) seed=$$seed --runs $(RUNS) $(ARGS); done

detect-coco: $(READY) ## Mask R-CNN on COCO: BACKBONE=… ENGINE=torchvision|detectron2 SCHEDULE=1x|2x ARGS="data.root=…"
	$(if $(filter 1x 2x,$(SCHEDULE)),,$(error SCHEDULE=$(SCHEDULE): 1x and 2x are valid))$(MIXMASK) transfer configs/transfer/detect_coco$(COCO_$(SCHEDULE)).yaml backbone=$(BACKBONE) \
		engine=$(ENGINE) --runs $(RUNS) $(ARGS)

segment: $(READY) ## Semantic segmentation: BACKBONE=… CONFIG=segment_voc|segment_voc_moco|segment_cityscapes ARGS="data.root=…"
	$(MIXMASK) transfer $(if $(filter segment%,$(CONFIG)),$(CONFIG),segment_voc) backbone=$(BACKBONE) --runs $(RUNS) $(ARGS)

show-detections: $(READY) ## What a detection run found, beside the truth: RUN=runs/transfer/… ARGS="--out found.html"
	$(if $(RUN),,$(error make show-detections: which run? RUN=runs/transfer/…))$(MIXMASK) show-detections $(RUN) $(ARGS)

suite: $(READY) ## Run a suite on SLURM: SUITE=configs/suites/… PROFILE=my_cluster.yaml CLUSTER=slurm|local|inline ARGS="data.NAME=… --dry-run"
	$(MIXMASK) launch $(SUITE) --cluster $(CLUSTER) $(if $(PROFILE),--profile $(PROFILE)) --runs $(RUNS) $(ARGS)

status: $(READY) ## How far a suite is: SUITE=… ARGS="--watch 30"
	$(MIXMASK) status $(SUITE) --runs $(RUNS) $(ARGS)

tables: $(READY) ## The paper's tables with your numbers: RUNS=… FORMAT=term|md|latex|csv|html ARGS="--table 7"
	$(MIXMASK) tables $(RUNS) --format $(FORMAT) $(ARGS)

report: $(READY) ## One HTML page of all results: RUNS=… REPORT=folder
	$(MIXMASK) report $(RUNS) --out $(REPORT) $(ARGS)

plots: $(READY) ## Every plot as PNG, SVG and PDF: RUNS=… ARGS="--out plots"
	$(MIXMASK) plots $(RUNS) $(ARGS)

verify: $(READY) ## Which finished runs reproduce what their configs expect: RUNS=…
	$(MIXMASK) verify $(RUNS) $(ARGS)

reference: $(READY) ## Write evaluate/reference.json anew, after a shipped recipe or suite was changed
	$(BIN)/python -m mixmask.launch.suite.reference

bench: $(READY) ## Measure the pretraining step, the data path and the loop; writes benchmarks/results/
	$(BIN)/python -m benchmarks.pretraining_step
	$(BIN)/python -m benchmarks.data_path $(ARGS)
	$(BIN)/python -m benchmarks.loop
	$(BIN)/python -m benchmarks.results
	$(BIN)/python -m benchmarks.frozen probes
	$(BIN)/python -m benchmarks.frozen knn

bench-gpu: $(READY) ## Measure this machine in ten minutes: bounds, pretraining, loader, transfer; writes bench/
	$(MIXMASK) bench $(ARGS)

docs: $(READY) ## Build the documentation into build/site; needs no network
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet
	@echo "build/site/index.html; with search: $(BIN)/python -m http.server --bind 127.0.0.1 --directory build/site"

pictures: $(READY) ## Make the pictures of README and docs again, from a finished demo: DEMO=demo
	$(BIN)/python docs/_pictures.py $(DEMO)

doctor: $(READY) ## Versions, devices, engines, data folders, and how to get what is missing
	$(MIXMASK) doctor
