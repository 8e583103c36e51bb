#!/usr/bin/env bash
# Builds MinkowskiEngine without CUDA, for engine `minkowski`, in an environment that has torch. See docs/engines.md.
#     scripts/install_minkowski.sh [python]      the environment's Python, by default that of .venv
set -euo pipefail

fail() {
    echo "install_minkowski: $1" >&2
    exit 1
}

python=${1:-$(dirname "${BASH_SOURCE[0]}")/../.venv/bin/python}
python=$(command -v "$python") || fail "there is no Python at ${1:-.venv/bin/python}: name the one to install for"
bin=$(cd "$(dirname "$python")" && pwd)
python=$bin/$(basename "$python")
"$python" -c 'import torch' 2>/dev/null || fail "$python cannot import torch: install fcmae there first"

# Before pip is asked for anything: whenever it looks at this package, its setup.py uninstalls what is installed.
if version=$("$python" -c 'from importlib.metadata import version; print(version("MinkowskiEngine"))' 2>/dev/null); then
    echo "MinkowskiEngine $version is installed already: nothing to do (uninstall it first if torch has changed since)"
    exit
fi

if uv --version >/dev/null 2>&1; then
    install=(uv pip install --python "$python")
elif "$python" -m pip --version >/dev/null 2>&1; then
    install=("$python" -m pip install)
else
    fail "there is neither uv nor a pip of $python: run $python -m ensurepip"
fi

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

packages="g++ libopenblas-dev python3-dev" # Debian's names
command -v g++ >/dev/null || fail "g++ is missing; on Debian: apt-get install $packages"
include=$("$python" -c 'import sysconfig; print(sysconfig.get_path("include"))')
printf '#include <Python.h>\n#include <cblas.h>\nint main() { cblas_dasum(0, nullptr, 1); }\n' >"$work/check.cpp"
g++ -I"$include" -o "$work/check" "$work/check.cpp" -lopenblas 2>/dev/null ||
    fail "g++ finds not all of Python.h, cblas.h and the OpenBLAS library; on Debian: apt-get install $packages"

# setup.py calls the first `pip` on PATH to uninstall, be it of another environment: give it one that does nothing.
printf '#!/bin/sh\n' >"$work/pip"
chmod +x "$work/pip"

echo "building MinkowskiEngine: some eight minutes of one core; MAX_JOBS limits how many compilers run at once"
"${install[@]}" 'setuptools<81' wheel ninja
# A cached wheel may have been built for another torch. Naming the BLAS spares setup.py a search that needs
# numpy.distutils, which ended with Python 3.11. Older pips need to be told that config settings count.
PATH="$work:$bin:$PATH" PIP_USE_PEP517=1 "${install[@]}" --no-cache-dir --no-build-isolation --no-deps \
    --config-settings='--global-option=--cpu_only --blas=openblas' MinkowskiEngine==0.5.4
