#!/usr/bin/env bash
# The tests on this machine: sets up .venv, installs torch for the reference tests, libtpu and servers of buckets, runs pytest. Safe to run again.
#
#   bash launch/test.sh                                    everything, a file to each of the cores (at most four)
#   bash launch/test.sh tests/agent -k endpoint            any arguments of pytest
#   bash launch/test.sh -m aot                             compilations for TPU slices that the default leaves out
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/environment.sh
prepare_environment
prepare_torch
prepare_libtpu
prepare_stores
export JAX_PLATFORMS=cpu TF_CPP_MIN_LOG_LEVEL=2
if [ "$*" = "" ] || [ "$*" = -q ]; then
  cores=$(nproc)
  set -- -n "$((cores < 4 ? cores : 4))" --dist loadfile "$@"
fi
exec .venv/bin/python -m pytest "$@"
