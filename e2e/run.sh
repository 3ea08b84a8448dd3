#!/usr/bin/env bash
# The end-to-end tests: e2e/run.sh [pytest arguments]
#
# On the cluster of KUBECONFIG if that is set, on kind if docker and kind are there, else on the built-in cluster, for
# which missing packages and the control plane's binaries are made ready first. docs/e2e.md tells more.
set -euo pipefail
cd "$(dirname "$0")/.."

python=.venv/bin/python
if [ ! -x "$python" ]; then
  echo "e2e: error: there is no .venv; run: make venv" >&2
  exit 1
fi
export PYTHONPATH=e2e

choice=$("$python" -m harness.cluster)
if [ "$choice" = builtin ]; then
  e2e/setup.sh
  "$python" -m harness.build >/dev/null
  # What a killed run left behind goes at the next one's start; what this one leaves, if it is killed, goes now.
  trap '"$python" -m harness.builtin sweep' EXIT
fi

# Without a path among the arguments: everything.
paths=(e2e)
for argument in "$@"; do
  [ -e "${argument%%::*}" ] && paths=()
done
"$python" -m pytest "${paths[@]}" "$@"
