#!/usr/bin/env bash
# Installs what the built-in cluster needs and a Debian machine may lack. Nothing where everything is there.
set -euo pipefail

# command: Debian package
needed=(
  ip:iproute2
  nft:nftables
  openssl:openssl
  unshare:util-linux
  nsenter:util-linux
  setpriv:util-linux
  mount:mount
  prometheus:prometheus
)
missing=()
for entry in "${needed[@]}"; do
  command -v "${entry%%:*}" >/dev/null || missing+=("${entry##*:}")
done
[ ${#missing[@]} -eq 0 ] && exit 0

packages=$(printf '%s\n' "${missing[@]}" | sort -u | tr '\n' ' ')
if ! command -v apt-get >/dev/null; then
  echo "e2e: error: missing commands; install what your system calls the Debian packages: $packages" >&2
  exit 1
fi
if [ "$(id -u)" -ne 0 ]; then
  echo "e2e: error: missing packages; run: sudo apt-get install $packages" >&2
  exit 1
fi
echo "e2e: installing $packages" >&2
export DEBIAN_FRONTEND=noninteractive
# Another installation on this machine is waited for.
apt=(apt-get -o DPkg::Lock::Timeout=300 -qq)
# shellcheck disable=SC2086
"${apt[@]}" install -y --no-install-recommends $packages >/dev/null 2>&1 \
  || { "${apt[@]}" update >/dev/null && "${apt[@]}" install -y --no-install-recommends $packages >/dev/null; }
