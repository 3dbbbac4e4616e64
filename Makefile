# Everything a person does with this checkout. Each recipe is what they would type; `make up` and `make test` need no
# step before them.

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
.PHONY: help setup up down destroy test check golden docs soak clean

STACK ?= dev
export MEMHARBOR_STACK := $(STACK)

# Recipes that need the environment source it the way a person does.
activate := source .venv/bin/activate

help: ## show this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "make %-10s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: ## get the engine, Python packages, Pulumi and images' raw material
	python3 infra/toolchain setup

up: setup ## stand a stack up: STACK=dev
	$(activate) && memharbor stack init
	$(activate) && pulumi up --yes --skip-preview --stack $(STACK)
	$(activate) && ansible-playbook ansible/playbooks/site.yml
	$(activate) && memharbor validate

down: setup ## stop the stack's containers and keep its data
	$(activate) && memharbor stack stop

destroy: ## delete the stack and its data: STACK=dev CONFIRM=dev
	@if [ "$(CONFIRM)" != "$(STACK)" ]; then \
		echo 'error: refused to destroy stack `$(STACK)` with its data: it was not confirmed' >&2; \
		echo 'hint: `make destroy STACK=$(STACK) CONFIRM=$(STACK)`' >&2; \
		exit 2; \
	fi
	@$(MAKE) --no-print-directory setup
	$(activate) && memharbor stack destroy --stack $(STACK) --confirm $(CONFIRM)

# All layers run, also after one that failed; the last line of each says how it went.
test: setup ## run the unit, integration and end-to-end tests
	@$(activate) && mkdir -p build/junit && failed= && \
	for layer in unit integration e2e; do \
		begin=$$SECONDS result=passed; \
		echo "pytest tests/$$layer -m 'not soak' --junitxml=build/junit/$$layer.xml"; \
		pytest tests/$$layer -m 'not soak' --junitxml=build/junit/$$layer.xml || { result=failed; failed="$$failed $$layer"; }; \
		echo "layer $$layer: $$result in $$((SECONDS - begin)) s"; \
	done && \
	if [ -n "$$failed" ]; then echo "error: failed layers:$$failed" >&2; exit 1; fi

check: setup ## format, lint, types and unit tests
	$(activate) && ruff format --check
	$(activate) && ruff check
	$(activate) && mypy
	$(activate) && yamllint --strict .
	$(activate) && ansible-lint --offline
	$(activate) && sqlfluff lint tests/golden
	$(activate) && git ls-files -z '*.sh' | xargs -0r shellcheck
	$(activate) && codespell
	$(activate) && git ls-files -z | xargs -0 detect-secrets-hook --baseline .secrets.baseline
	$(activate) && pytest tests/unit

golden: setup ## rewrite the golden files; review the diff
	$(activate) && pytest tests/unit --update-golden

docs: setup ## rewrite the generated reference pages
	$(activate) && python docs/generate.py

soak: setup ## run the long tests: interleavings, kills, drills
	$(activate) && pytest tests -m soak

clean: ## delete what tests and linters left in the checkout; the environment and the stacks' state stay
	rm -rf build .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +
