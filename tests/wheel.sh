#!/usr/bin/env bash
# The image's wheel, as the Dockerfile makes it, from what the image's build takes in and nothing else; the installed program runs,
# and runs compiled. Minutes: it compiles.
set -euo pipefail
cd "$(dirname "$0")/.."
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
mkdir "$work/context"
sed -n 's/^!//p' .dockerignore | xargs git ls-files -z -- | xargs -0 cp --parents -t "$work/context"
cd "$work/context"
sh scripts/install_wheel.sh 1 "$work/kvfleet"
cd "$work"
kvfleet/bin/kvfleet --version
kvfleet/bin/python -c 'import kvfleet_router.core.dispatcher as m; assert m.__file__.endswith(".so"), m.__file__'
kvfleet/bin/kvfleet simulate -f context/examples/bench8 --trace shared-prefix --policy kvfleet --load 0.6 --limit 300
