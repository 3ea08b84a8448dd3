#!/usr/bin/env bash
# Installs what the tests need and a Debian machine may lack: a Redis server, which each test starts for itself.
# As root only; elsewhere the tests that need it are skipped and say so (in CI they fail).
set -euo pipefail

command -v redis-server >/dev/null && exit 0
if ! command -v apt-get >/dev/null || [ "$(id -u)" -ne 0 ]; then
  echo "note: no redis-server here: tests of router replicas are skipped; to run them: sudo apt-get install redis-server" >&2
  exit 0
fi
echo "tests: installing redis-server" >&2
export DEBIAN_FRONTEND=noninteractive RUNLEVEL=1 # runlevel 1: the packages' own service is not started
apt-get install -y -qq --no-install-recommends redis-server >/dev/null 2>&1 \
  || { apt-get update -qq >/dev/null && apt-get install -y -qq --no-install-recommends redis-server >/dev/null; }
