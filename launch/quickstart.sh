#!/usr/bin/env bash
# The whole recipe in miniature on this machine: sets up .venv, runs every stage, ends with the path of a report.
# Safe to run again: finished work is kept, an interrupted stage continues.
#
#   bash launch/quickstart.sh                              8 to 17 minutes on 2 cores, depending on load
#   bash launch/quickstart.sh --seeds=3                    three training seeds, one report
#   bash launch/quickstart.sh --config.run_dir=runs/other  any flag of python -m launch.quickstart
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/environment.sh
prepare_environment
exec .venv/bin/python -m launch.quickstart "$@"
