# `make` shows what there is. Everything lives in this folder: .venv (the locked dependencies) and
# .latent-gpt (services and their data, logs of runs). No target has logic of its own: `latent-gpt` does.

PYTHON ?= python3
PRESET ?=
# Of the command line alone: other programs have variables of these names.
DATA :=
MINUTES :=
EFFORT :=
PROMPT ?= red apple
OUT ?= out.png
CRON ?=
ARGS ?=
PART ?= jobs
# What `cluster.env` says to make, unless the command line or the environment does; `latent-gpt` reads the rest of it.
TOLD := REGISTRY|BASE|TORCH_INDEX|CA|BUILDER|BUILD_FLAGS|PUSH_FLAGS|NAMESPACE|KUBECONFIG|KFP_ENDPOINT
ifneq ($(wildcard cluster.env),)
-include build/cluster.mk
build/cluster.mk: cluster.env Makefile
	@mkdir -p build && rm -f $@
	@umask 077 && sed -nE 's/[[:space:]]+$$//; s/\$$/$$$$/g; s/#/\\#/g; s/^($(TOLD))=(.*)/ifndef \1\n\1 = \2\nendif/p' $< >$@
endif
ifdef NAMESPACE
export LATENT_GPT_NAMESPACE := $(NAMESPACE)
test-cluster: export NAMESPACE := $(NAMESPACE)
endif
ifdef KUBECONFIG
cluster cluster-addons test-cluster: export KUBECONFIG := $(KUBECONFIG)
endif
ifdef KFP_ENDPOINT
test-cluster: export KFP_ENDPOINT := $(KFP_ENDPOINT)
endif
# As they were typed: a prompt's dollar signs are no variables of make's.
override PRESET := $(value PRESET)
override DATA := $(value DATA)
override MINUTES := $(value MINUTES)
override EFFORT := $(value EFFORT)
override PROMPT := $(value PROMPT)
override OUT := $(value OUT)
override CRON := $(value CRON)
export PRESET DATA MINUTES EFFORT PROMPT OUT CRON REGISTRY BASE TORCH_INDEX CA BUILDER BUILD_FLAGS PUSH_FLAGS
# What `make cluster-addons` installs, and `make cluster` starts.
KFP_VERSION := 2.17.0
OPERATOR_VERSION := v1.9.4
KUEUE_VERSION := v0.17.0
NODE_VERSION := v1.34.0
CHECKOV_VERSION := 3.3.30
# A user's own pip settings must not lead an installation out of .venv.
export PIP_USER := 0
unexport PIP_TARGET PIP_PREFIX PIP_ROOT

# What was said of these, as the shell hands it over; of what was not, `latent-gpt` knows the rest.
OF_PRESET := $${PRESET:+--preset "$$PRESET"}
OF_DATA := $${DATA:+--data "$$DATA"}
OF_DIAL := $${MINUTES:+--minutes "$$MINUTES"} $${EFFORT:+--effort "$$EFFORT"}
BIN := .venv/bin
AT_ONCE := -n logical --maxprocesses 4 --dist loadfile  # a file of tests is one process's
UV := $(BIN)/uv
SYNC := $(UV) pip sync --python $(BIN)/python --require-hashes --compile-bytecode --quiet
COMPILE := $(UV) pip compile --universal --python-version 3.11 --generate-hashes --quiet \
	--no-emit-index-url --no-emit-find-links --custom-compile-command "make lock"

.DEFAULT_GOAL := help
.PHONY: help run plan retrain generate mlflow-ui gc preflight build-and-deploy build push secrets deploy upload submit schedule undeploy \
	cluster cluster-addons test test-fast test-cluster mutants lint lint-k8s lock bench bench-gpu clean

##@ Use

run: .venv/run.stamp ## Run the whole pipeline here (DATA=pictures MINUTES=25, or PRESET=openmoji-tiny ARGS="--set a.b=c")
	@$(BIN)/latent-gpt run $(OF_PRESET) $(OF_DATA) $(OF_DIAL) $(ARGS)

plan: .venv/run.stamp ## What a run would choose and take, each with its reason (DATA=pictures MINUTES=25)
	@$(BIN)/latent-gpt plan $${PRESET:+"$$PRESET"} $(OF_DATA) $(OF_DIAL) $(ARGS)

retrain: .venv/run.stamp ## The same again where source or settings are new, from the champion's weights
	@$(BIN)/latent-gpt retrain $(OF_PRESET) $(OF_DATA) $(OF_DIAL) $(ARGS)

generate: .venv/run.stamp ## A picture from the registered champion (PROMPT="red apple" OUT=apple.png)
	@$(BIN)/latent-gpt generate "$$PROMPT" --out "$$OUT" $(ARGS)

mlflow-ui: .venv/run.stamp ## Open MLflow on what the runs left
	@$(BIN)/latent-gpt mlflow-ui

gc: .venv/run.stamp ## List what no model and no run needs any more (ARGS="--delete" deletes it)
	@$(BIN)/latent-gpt gc $(ARGS)

##@ On a cluster

preflight: .venv/run.stamp ## Find out what would stop a run, here or (NAMESPACE=kubeflow) on the cluster of KUBECONFIG
	@$(BIN)/latent-gpt preflight $(OF_PRESET) $(OF_DATA) $(OF_DIAL) $(if $(NAMESPACE),--cluster) $(ARGS)

build-and-deploy: .venv/run.stamp ## All of the next five, as far as there is something to do (REGISTRY=… KFP_ENDPOINT=…)
	@$(MAKE) --no-print-directory -j1 build push secrets deploy upload

build: ## Build both images (REGISTRY=ghcr.io/me; docker/image.sh says what else)
	@docker/image.sh build

push: ## Push them, and keep their digests in build/
	@docker/image.sh push

secrets: .venv/run.stamp ## Make the cluster's Secrets, or take yours from the environment; what is there is kept
	@$(BIN)/latent-gpt secrets $(ARGS)

deploy: .venv/run.stamp ## Put S3, MLflow and what steps need on the cluster (OVERLAY=local, or production)
	@$(BIN)/latent-gpt deploy

upload: .venv/run.stamp ## The pipelines into KFP
	@$(BIN)/latent-gpt upload

submit: .venv/run.stamp ## Run one there (PRESET=openmoji-tiny ARGS="--follow --set a.b=c")
	@$(BIN)/latent-gpt submit $(OF_PRESET) $(OF_DATA) $(OF_DIAL) $(ARGS)

schedule: .venv/run.stamp ## Retrain there at set times, where there is anything new (CRON="0 0 3 * * *")
	@$(BIN)/latent-gpt schedule --cron "$$CRON" $(OF_PRESET) $(OF_DATA) $(OF_DIAL) $(ARGS)

undeploy: .venv/run.stamp ## Take all of it away, but for the data
	@$(BIN)/latent-gpt undeploy

cluster: ## A cluster on this machine, by kind and Docker (not tried by us)
	@kind create cluster --name latent-gpt --image kindest/node:$(NODE_VERSION)

cluster-addons: ## KFP, the training operator and Kueue into the cluster of KUBECONFIG (not tried by us)
	@kubectl apply -k "github.com/kubeflow/pipelines/manifests/kustomize/cluster-scoped-resources?ref=$(KFP_VERSION)"
	@kubectl wait --for condition=established --timeout=60s crd/applications.app.k8s.io
	@kubectl apply -k "github.com/kubeflow/pipelines/manifests/kustomize/env/platform-agnostic?ref=$(KFP_VERSION)"
	@kubectl apply --server-side -k \
		"github.com/kubeflow/training-operator/manifests/overlays/standalone?ref=$(OPERATOR_VERSION)"
	@kubectl apply --server-side -f \
		"https://github.com/kubernetes-sigs/kueue/releases/download/$(KUEUE_VERSION)/manifests.yaml"

##@ Develop

test: lint ## Lint, types, and every test: the fast ones, then those with real services and training
	@$(BIN)/pytest $(AT_ONCE) -m "not slow and not cluster"
	@$(BIN)/pytest $(AT_ONCE) -m "slow and not cluster"

test-fast: .venv/dev.stamp ## The tests without services and training, in two minutes
	@$(BIN)/pytest $(AT_ONCE) -m "not slow and not cluster"

test-cluster: .venv/dev.stamp ## The tests on a real cluster (README "On a cluster"; PART="manifests preflight jobs pipeline schedule")
	@$(BIN)/pytest -m cluster $(PART:%=tests/cluster/test_%.py) $(ARGS)

mutants: .venv/dev.stamp ## Break one promise at a time, and see that its test notices (ARGS="config")
	@$(BIN)/python -m tests.mutants $(ARGS)

lint: .venv/dev.stamp ## ruff and mypy
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

bench: .venv/bench.stamp ## Ours beside its peers, on CPU (ARGS="--rows 4,7")
	@$(BIN)/python -m benchmarks $(ARGS)

bench-gpu: ## The GPU half, on a machine that has one, in 8 minutes (ARGS="--minutes 0": without a limit)
	@$(PYTHON) -m benchmarks --gpu --minutes 8 $(ARGS)

# Not held against us: images are pinned by deploy (14, 43); steps, boto3 and MLflow read keys from the environment
# (35); a server without a limit of CPU takes what nobody else wants (11).
lint-k8s: .venv/dev.stamp ## A policy checker over the manifests, in an environment of its own (needs kubectl or kustomize)
	@$(BIN)/python -m tests.k8s build/k8s
	@$(UV) tool run --quiet --from checkov==$(CHECKOV_VERSION) checkov --directory build/k8s --framework kubernetes \
		--compact --quiet --skip-download --skip-check CKV_K8S_11,CKV_K8S_14,CKV_K8S_35,CKV_K8S_43

lock: $(UV) ## Lock the dependencies anew (versions already locked are kept where they still fit)
	@$(COMPILE) pyproject.toml --output-file requirements.lock
	@$(COMPILE) docker/mlflow.in --constraint requirements.lock --output-file requirements-mlflow.lock
	@$(COMPILE) pyproject.toml --extra dev --constraint requirements.lock --output-file requirements-dev.lock
	@$(COMPILE) pyproject.toml --extra dev --extra bench --constraint requirements-dev.lock --output-file requirements-bench.lock

clean: ## Delete .venv and .latent-gpt: trained models, reports and MLflow's records with it
	@rm -rf .venv .latent-gpt

# Set-up, done by the targets above

# A bare `make run` needs no development tools; the development set contains the runtime set.
.venv/run.stamp: requirements.lock pyproject.toml $(UV)
	@echo "installing the locked dependencies into .venv"
	@$(SYNC) requirements.lock
	@$(UV) pip install --python $(BIN)/python --quiet --no-deps --no-build-isolation --editable .
	@rm -f .venv/dev.stamp .venv/bench.stamp
	@touch $@

.venv/dev.stamp: requirements-dev.lock pyproject.toml $(UV)
	@echo "installing the locked dependencies and the development tools into .venv"
	@$(SYNC) requirements-dev.lock
	@$(UV) pip install --python $(BIN)/python --quiet --no-deps --no-build-isolation --editable .
	@rm -f .venv/bench.stamp
	@touch .venv/run.stamp $@

# Peers: most of them beside ours, one that does not resolve there into a folder of its own.
.venv/bench.stamp: requirements-bench.lock benchmarks/peers.txt pyproject.toml $(UV)
	@echo "installing the benchmarks' peers"
	@$(SYNC) requirements-bench.lock
	@$(UV) pip install --python $(BIN)/python --quiet --no-deps --no-build-isolation --editable .
	@$(UV) pip install --python $(BIN)/python --quiet --no-deps --target build/peers -r benchmarks/peers.txt
	@touch .venv/run.stamp .venv/dev.stamp $@

$(UV): requirements-uv.lock
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "error: Python 3.11 or newer is needed")'
	@$(PYTHON) -m venv .venv
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --require-hashes -r requirements-uv.lock
	@touch $@

help:
	@awk 'BEGIN {FS = ":.*## "} /^##@/ {printf "\n%s\n", substr($$0, 5)} \
		/^[a-z0-9-]+:.*## / {printf "  make %-16s %s\n", $$1, $$2}' $(MAKEFILE_LIST)
