#!/bin/sh
# sh scripts/install_wheel.sh COMPILE DIR: a wheel of the sources here, compiled where COMPILE is 1, in a new environment DIR.
# The environment has no pip, and no source of a dependency is built for it. What the Dockerfile does; `make test-wheel` does the same.
set -eu
compile=$1 into=$2
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/build"
pip="$work/build/bin/pip"
"$pip" install --quiet --constraint constraints.txt hatchling
if [ "$compile" = 1 ]; then
  # shellcheck disable=SC2046 # a word for each
  "$pip" install --quiet --only-binary=:all: --constraint constraints.txt mypy setuptools \
    $("$work/build/bin/python" scripts/compile_router.py --requirements)
fi
KVFLEET_COMPILE=$compile "$pip" wheel --no-build-isolation --no-deps --wheel-dir "$work/dist" .
python3 -m venv --without-pip "$into"
"$pip" --python "$into/bin/python" install --quiet --only-binary=:all: --constraint constraints.txt "$work"/dist/*.whl
