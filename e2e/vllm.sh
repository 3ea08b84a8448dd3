#!/bin/sh
# Stands in for the program `vllm` of real vLLM images, which start with `vllm serve MODEL …`: the simulated worker
# takes the arguments that follow. E2E_SPEED: simulated seconds in a real one; E2E_PROFILE: accelerator profile.
if [ "$1" != serve ]; then
  echo "vllm: only 'vllm serve' is simulated, not '$1'" >&2
  exit 2
fi
shift
exec kvfleet worker "$@" --speed "${E2E_SPEED:-20}" ${E2E_PROFILE:+--profile "$E2E_PROFILE"}
