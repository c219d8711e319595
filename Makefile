# SPDX-License-Identifier: Apache-2.0
# What a newcomer types; the work is done by deploy/dev/*. On Debian 12 each command first installs what is missing.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help

PREFIX ?= /usr/local
DESTDIR ?=
BUILD_TYPE ?= RelWithDebInfo
NODES ?= 1

.PHONY: help build demo check soak tidy format install clean packages

help: ## this list
	@echo "expertd: commands for a Debian 12 machine with git, make and apt (root or sudo)"
	@awk -F ':.*## ' '/^[a-z]+:.*## /{printf "  make %-10s %s\n", $$1, $$2}' Makefile
	@echo "EXPERTD_CUDA=OFF builds without CUDA; EXPERTD_PACKAGES=skip installs no packages; PREFIX and DESTDIR as usual."

packages:
	@deploy/dev/install-packages build

build: packages ## build the daemon, the client library and expertctl into build/
	@deploy/dev/build build -DCMAKE_BUILD_TYPE=$(BUILD_TYPE) -- expertd_programs

demo: build ## run dispatch and combine through a real daemon and compare every output; NODES=2: through two that exchange
	@NODES="$(NODES)" EXPERTD_BIN_DIR="$${EXPERTD_BIN_DIR:-$(CURDIR)/build/bin}" deploy/demo

check: ## every check and test; what CI runs
	@deploy/dev/install-packages build check
	@deploy/dev/check

soak: ## the randomised and fault tests again and again, EXPERTD_SOAK_MINUTES=60
	@deploy/dev/install-packages build check soak
	@deploy/dev/soak

tidy: ## clang-tidy over the sources, or FILES="a.cc b.cc"
	@deploy/dev/tidy $(FILES)

format: ## clang-format every source file in place
	@deploy/dev/format --fix

install: build ## install below PREFIX=/usr/local
	@DESTDIR="$(DESTDIR)" cmake --install build --prefix "$(PREFIX)"

clean: ## remove build/ and build-*/
	@rm -rf build build-*
