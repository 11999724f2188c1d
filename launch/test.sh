#!/usr/bin/env bash
# The tests on this machine: sets up .venv, installs torch for the reference tests and libtpu, runs pytest. Safe to run again.
#
#   bash launch/test.sh                                    everything
#   bash launch/test.sh tests/agent -k endpoint            any arguments of pytest
#   bash launch/test.sh -m aot                             compilations for TPU slices that the default leaves out
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/environment.sh
prepare_environment
prepare_torch
prepare_libtpu
export JAX_PLATFORMS=cpu TF_CPP_MIN_LOG_LEVEL=2
exec .venv/bin/python -m pytest "$@"
