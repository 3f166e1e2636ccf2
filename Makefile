# Targets: build demo test test-unit test-crash sim bench fuzz lint fmt generate clean
SHELL       := /bin/bash
export CGO_ENABLED ?= 0
export PATH := $(PATH):/usr/sbin:/sbin
STATICCHECK := honnef.co/go/tools/cmd/staticcheck@v0.8.2
FUZZTIME    ?= 30s
# How many seeds of the simulator, and which is the first: a long run can be cut
# into pieces.
SEEDS       ?= 2000
FIRST       ?= 1
# Further flags for go test, e.g. TESTFLAGS=-v.
TESTFLAGS   ?=
GOBUILD     := go build -trimpath -buildvcs=false -ldflags '-s -w'
UNIT        := ./cmd/... ./internal/... ./pkg/...

# Tests that need root run as root; the go command itself stays with the caller.
ifneq ($(shell id -u),0)
SUDO := sudo
EXEC := -exec 'sudo env PATH=$(PATH) NFCF_BIN=$(CURDIR)/bin'
endif

.PHONY: all build demo test test-unit test-race test-root test-crash sim bench fuzz lint vet fmt generate clean deps-test
all: build

build:
	@mkdir -p bin
	$(GOBUILD) -o bin/ ./cmd/nfconnfilter ./cmd/ckptctl

bin/demo bin/bytecount bin/pool bin/interp bin/bench: build FORCE
	@$(GOBUILD) -o $@ ./test/$(@F)
FORCE:

demo: bin/demo
	@scripts/demo.sh

deps-test:
	@scripts/deps.sh test
	@$(SUDO) scripts/criu.sh >/dev/null

vet:
	go vet ./...

# What needs neither root nor a program: pure tests, scenarios and the fuzz corpus.
test-unit: vet
	go test $(TESTFLAGS) $(UNIT) ./test/imports/ ./test/clients/ ./test/harness/ ./test/bytecount/ ./test/interp/

# Long tests of one goroutine are left out: there is nothing that could race.
test-race: deps-test
	CGO_ENABLED=1 go test $(TESTFLAGS) -race -count=1 -timeout 10m -skip '^(TestPowerFails.*|TestDiskLies|TestCut|TestHours.*)$$' $(EXEC) $(UNIT) ./test/clients/ ./test/harness/ ./test/interp/

# In two halves at once, each in namespaces of its own: they wait more than they work.
test-root: deps-test bin/bytecount bin/demo bin/pool bin/interp
	NFCF_BIN=$(CURDIR)/bin scripts/testroot.sh -timeout 18m $(EXEC)

test: deps-test build vet
	go test $(TESTFLAGS) -timeout 10m $(EXEC) $(UNIT) ./test/imports/ ./test/clients/ ./test/harness/ ./test/bytecount/ ./test/interp/
	@$(MAKE) --no-print-directory sim
	@$(MAKE) --no-print-directory test-race
	@$(MAKE) --no-print-directory test-root

# What dies on the way: filter and agent at every boundary of their effects in every state and at any
# time, at least KILLS times in each of four settings, in an order that KILLSEED makes; and for SOAK
# what they have of the machine does not grow.
KILLS    ?= 130
KILLSEED ?= 1
SOAK     ?= 30m
# and for how many simulated hours 10,000 connections are held.
HOURS ?= 24
test-crash: deps-test bin/bytecount bin/demo bin/pool bin/interp
	go test -count=1 -v ./pkg/filter/filtertest/sim -run '^TestHours' -hours $(HOURS)
	NFCF_BIN=$(CURDIR)/bin go test -count=1 -v -timeout 150m $(EXEC) ./test -run '^(TestKills|TestSoak)$$' -kills $(KILLS) -every -kill-seed $(KILLSEED) -soak $(SOAK)

# The engine between two real TCP stacks. A seed that fails is named with the
# command that plays it again.
sim:
	go test $(TESTFLAGS) -count=1 -timeout 60m ./pkg/filter/filtertest/sim -run TestSeeds -first $(FIRST) -seeds $(SEEDS)

bench: bin/bench
	@scripts/deps.sh bench
	@$(SUDO) scripts/criu.sh >/dev/null
	$(SUDO) env PATH="$$PATH" bin/bench
	go test -run '^$$' -bench . -benchmem $(EXEC) ./internal/... ./pkg/...

fuzz:
	scripts/fuzz.sh $(FUZZTIME)

lint: vet
	@files=$$(gofmt -l .); if [ -n "$$files" ]; then echo "not formatted (run make fmt):"; echo "$$files"; exit 1; fi
	go run $(STATICCHECK) ./...
	go test -count=1 ./test/imports/

fmt:
	gofmt -w .

generate:
	scripts/generate.sh

clean:
	rm -rf bin
