# Everything a person does with this checkout. Each recipe is what they would type; `make up` and `make test` need no
# step before them.

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
.PHONY: help setup up down destroy test test-lint test-unit test-integration test-e2e check golden docs soak clean

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
	$(activate) && pulumi up --yes --skip-preview --refresh --stack $(STACK)
	$(activate) && ansible-playbook ansible/playbooks/site.yml
	$(activate) && memharbor validate

down: setup ## stop a stack: containers go, its data stays: STACK=dev
	$(activate) && pulumi destroy --yes --skip-preview --exclude-protected --stack $(STACK)

destroy: ## delete a stack with its data: STACK=dev CONFIRM=dev
	@if [ "$(CONFIRM)" != "$(STACK)" ]; then \
		echo 'error: refused to delete stack `$(STACK)` with its data: it was not confirmed' >&2; \
		echo 'hint: run `make destroy STACK=$(STACK) CONFIRM=$(STACK)`' >&2; \
		exit 2; \
	fi
	@$(MAKE) --no-print-directory setup
	$(activate) && memharbor stack destroy $(STACK) --yes

# All layers run, also after one that failed; the last line of each says how it went.
test: setup ## lint, then run the unit, integration and end-to-end tests
	@mkdir -p build/junit; failed=; \
	for layer in lint unit integration e2e; do \
		begin=$$SECONDS result=passed; \
		$(MAKE) --no-print-directory "test-$$layer" || { result=failed; failed="$$failed $$layer"; }; \
		echo "layer $$layer: $$result in $$((SECONDS - begin)) s"; \
	done; \
	if [ -n "$$failed" ]; then echo "error: failed layers:$$failed" >&2; exit 1; fi

test-unit test-integration test-e2e: test-%:
	$(activate) && pytest tests/$* -m 'not soak' --junitxml=build/junit/$*.xml

test-lint:
	$(activate) && ruff format --check --quiet
	$(activate) && ruff check --quiet
	$(activate) && mypy
	$(activate) && yamllint --strict .
	$(activate) && ANSIBLE_INVENTORY=tests/data/inventory.yml ANSIBLE_INVENTORY_ENABLED=yaml ansible-lint --offline
	$(activate) && sqlfluff lint --disable-progress-bar tests/golden/sql
	$(activate) && git grep -lzE '^#!.*/(ba)?sh' -- docker .ci infra | xargs -0r shellcheck
	$(activate) && codespell
	$(activate) && git ls-files -z | xargs -0 detect-secrets-hook --exclude-files '(\.lock|\.sum)$$' --exclude-lines '[0-9a-f]{64}'

check: setup test-lint ## the inner loop: format, lint, types, secret scan and unit tests
	$(activate) && pytest tests/unit -m 'not soak'

golden: setup ## rewrite the golden files; review the diff
	$(activate) && pytest tests/unit -m 'not soak' --update-golden

docs: setup ## rewrite the generated reference pages
	$(activate) && python docs/generate.py

soak: setup ## run the long tests: interleavings, kills, drills
	$(activate) && pytest tests -m soak

clean: ## delete what tests and linters left in the checkout; the environment and the stacks' state stay
	rm -rf build .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +
