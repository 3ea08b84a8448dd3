"""Every generated file of the repository: written, or with `--check` compared, each difference named.

    python scripts/generate.py            # make generate
    python scripts/generate.py --check    # make verify

Order matters when writing: the chart copies CRDs and profiles.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import chart
import dashboards

from kvfleet_api import apidocs, schema

ROOT = Path(__file__).resolve().parents[1]

Outputs = Callable[[], dict[Path, str]]
GENERATORS: tuple[Outputs, ...] = (
    lambda: {Path("crds") / name: text for name, text in schema.all_crds().items()},
    lambda: {Path("docs/api.md"): apidocs.markdown()},
    chart.outputs,
    dashboards.outputs,
)
"""Each gives paths below the repository's root with what should be in them."""


def main() -> int:
    parser = argparse.ArgumentParser(description="Write the generated files, or check them.")
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 when a file differs")
    check = parser.parse_args().check
    stale = 0
    for outputs in GENERATORS:
        for path, text in outputs().items():
            target = ROOT / path
            current = target.read_text(encoding="utf-8") if target.is_file() else None
            if current == text:
                continue
            stale += 1
            if check:
                sys.stderr.write(f"{path}: not what the code generates: run `make generate` and commit the result\n")
            else:
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_text(text, encoding="utf-8")
                sys.stdout.write(f"wrote {path}\n")
    return 1 if check and stale else 0


if __name__ == "__main__":
    sys.exit(main())
