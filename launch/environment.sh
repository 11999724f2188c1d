# Sourced by the scripts beside it: makes or updates the virtual environment .venv in the repository's root.
#
#   prepare_environment    packages of requirements.lock and this package; returns at once when nothing changed
#   prepare_torch          torch, which only the reference tests use
#   prepare_libtpu         libtpu (0.2 GB; Linux x86-64 only), with which tests compile for TPUs without one
#   prepare_stores         servers that stand for buckets of S3 and Google Cloud Storage in tests
#
# Environment variables: PYTHON (interpreter to build .venv with; default: the first of python3, python3.12, python3.11
# that is 3.11 or 3.12). pip's own variables (PIP_INDEX_URL, PIP_EXTRA_INDEX_URL, PIP_FIND_LINKS, ...) are obeyed.

TORCH_VERSION=2.13.0
LIBTPU_VERSION=0.0.51 # as in setup.cfg's extra tpu: schedules and memory are tested against this compiler
MOTO_VERSION=5.2.5
GCS_VERSION=2026.7.19
NEEDED_GB=5 # TensorFlow alone is 1.8

fail() {
  echo "error: $*" >&2
  exit 2
}

usable_python() {
  "$1" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))' >/dev/null 2>&1
}

find_python() {
  if [ -n "${PYTHON:-}" ]; then
    usable_python "$PYTHON" || fail "PYTHON=$PYTHON is not Python 3.11 or 3.12; set PYTHON to one that is"
    echo "$PYTHON"
    return
  fi
  local candidate
  for candidate in python3 python3.12 python3.11; do
    if usable_python "$candidate"; then
      echo "$candidate"
      return
    fi
  done
  fail "expected Python 3.11 or 3.12, found $(python3 --version 2>&1 || true); install one (Debian, Ubuntu: apt-get install python3.11 python3.11-venv) or set PYTHON=/path/to/python3.11"
}

# Prints how far pip is instead of two hundred lines; everything is in the log.
show_pip() {
  awk -v total="$1" '
    /^(Collecting|Requirement already satisfied)/ { if (++n % 25 == 0 || n == total) { print "  " n " of " total " packages found"; fflush() } }
    /^Installing collected/ { print "  installing"; fflush() }
    /^ERROR|^error/ { print "  " $0; fflush() }'
}

pip_install() { # what, number of packages, pip arguments...
  local what=$1 total=$2
  shift 2
  echo "installing $what into .venv (log: .venv/install.log)"
  # --no-compile: most of TensorFlow's modules are never imported; the others are compiled at their first import.
  if ! .venv/bin/python -m pip install --disable-pip-version-check --no-input --no-compile --progress-bar off "$@" 2>&1 |
    tee -a .venv/install.log | show_pip "$total"; then
    fail "installing $what failed: $(tail -n 1 .venv/install.log); the log is .venv/install.log; check the network and the disk, then run the same command"
  fi
}

prepare_environment() {
  # Two commands at once (quickstart and tests) must not build one environment together.
  if command -v flock >/dev/null; then
    exec 9>.venv.lock
    flock -n 9 || { echo "another command is preparing .venv; waiting"; flock 9; }
  fi
  if [ -e .venv ] && ! { usable_python .venv/bin/python && .venv/bin/python -m pip --version >/dev/null 2>&1; }; then
    echo ".venv is broken or made by another Python; making it again"
    rm -rf .venv
  fi
  local wanted
  wanted=$(cat requirements.lock setup.cfg pyproject.toml | cksum)
  if [ "$(cat .venv/ready 2>/dev/null)" != "$wanted $PWD" ]; then
    if [ ! -e .venv ]; then
      local python free
      python=$(find_python) || exit 2
      "$python" -c 'import ensurepip, venv' 2>/dev/null ||
        fail "$python has no venv or ensurepip; install them (Debian, Ubuntu: apt-get install python3-venv) or set PYTHON to another interpreter"
      free=$(($(df -Pk . | awk 'NR == 2 { print $4 }') / 1048576))
      [ "$free" -ge "$NEEDED_GB" ] || fail "the packages need $NEEDED_GB GB, $(pwd) has $free GB free; free space and run the same command"
      "$python" -m venv .venv || fail "$python -m venv .venv failed; see the lines above"
    fi
    : >.venv/install.log
    pip_install "the packages of requirements.lock" "$(grep -c == requirements.lock)" --no-deps -r requirements.lock
    pip_install "stepdr_jax" 1 --no-deps --no-build-isolation -e .
    echo "$wanted $PWD" >.venv/ready
  fi
  if command -v flock >/dev/null; then exec 9>&-; fi
}

prepare_torch() {
  if ! .venv/bin/python -c "import importlib.metadata as m, sys; sys.exit(m.version('torch').split('+')[0] != '$TORCH_VERSION')" 2>/dev/null; then
    pip_install "torch $TORCH_VERSION for the reference tests" 1 "torch==$TORCH_VERSION" networkx==3.6.1 sympy==1.14.0 mpmath==1.3.0
  fi
}

prepare_libtpu() {
  [ "$(uname -sm)" = "Linux x86_64" ] || { echo "no libtpu for $(uname -sm): tests that compile for TPUs are skipped"; return; }
  if ! .venv/bin/python -c "import importlib.metadata as m, sys; sys.exit(m.version('libtpu') != '$LIBTPU_VERSION')" 2>/dev/null; then
    pip_install "libtpu $LIBTPU_VERSION for tests that compile for TPUs" 1 --no-deps "libtpu==$LIBTPU_VERSION"
  fi
}

prepare_stores() {
  if ! .venv/bin/python -c "import importlib.metadata as m, sys; sys.exit((m.version('moto'), m.version('gcp-storage-emulator')) != ('$MOTO_VERSION', '$GCS_VERSION'))" 2>/dev/null; then
    pip_install "servers of buckets for tests" 20 -c requirements.lock "moto[s3]==$MOTO_VERSION" flask==3.1.3 flask-cors==6.0.5 "gcp-storage-emulator==$GCS_VERSION"
  fi
}
