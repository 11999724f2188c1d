#!/usr/bin/env bash
# The tests on this machine: sets up .venv, installs torch for the reference tests, runs pytest. Safe to run again.
#
#   bash launch/test.sh                                    everything
#   bash launch/test.sh tests/agent -k endpoint            any arguments of pytest
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/environment.sh
prepare_environment
prepare_torch
export JAX_PLATFORMS=cpu TF_CPP_MIN_LOG_LEVEL=2
exec .venv/bin/python -m pytest "$@"
