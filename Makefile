# The front door. Every target is one hmmstorm command; `make help` lists them, `make hmmstorm` builds the command
# itself (target/release/hmmstorm), whose --help says the rest.

HMMSTORM := target/release/hmmstorm
# Options for the command behind a target: make storm ARGS="--variant wait-on-locked --seed 7"
ARGS ?=

.DEFAULT_GOAL := help
.PHONY: help run test test-host lint storm matrix gdb doctor setup build hmmstorm boot-time full-counts clean

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

run: hmmstorm ## a shell in a guest with two GPUs; fetches and builds what is missing
	$(HMMSTORM) run $(ARGS)

test: ## every test there is: host, lints, virtual machines; the last line counts them
	ci/test

test-host: ## the part of the tests that needs no virtual machine
	ci/test --host

lint: ## formatting and lints alone
	ci/test --lint

storm: hmmstorm ## the livelock on the stock kernel, then its cure
	$(HMMSTORM) storm drain-livelock --variant trylock --expect livelock $(ARGS)
	$(HMMSTORM) storm drain-livelock --variant wait-on-locked --expect pass $(ARGS)

matrix: hmmstorm ## the small matrix: bug, cure, controls, as CI runs it
	$(HMMSTORM) matrix ci/plans/small.toml $(ARGS)

gdb: hmmstorm ## the guest under gdb, kernel and driver symbols loaded
	$(HMMSTORM) gdb $(ARGS)

doctor: hmmstorm ## what this host has and lacks, and the command that mends it
	$(HMMSTORM) doctor $(ARGS)

setup: hmmstorm ## fetch and verify everything; afterwards nothing needs a network
	$(HMMSTORM) setup $(ARGS)

build: hmmstorm ## kernel, module, device and guest image
	$(HMMSTORM) build $(ARGS)

boot-time: hmmstorm ## boot with and without the GPUs, alternating, with the ratio
	ci/boot-time $(ARGS)

full-counts: hmmstorm ## bug, cure and controls over 20 seeds, as a table
	ci/full-counts $(ARGS)

hmmstorm: ## the command itself
	@cargo build --quiet --release --locked -p hmmstorm

clean: ## build output of this checkout; the cache stays (see `hmmstorm doctor` for its place)
	cargo clean
