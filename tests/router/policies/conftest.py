"""The helper module `routing_fleet` of the core's tests is imported by name; importlib mode adds no path."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent / "core"))
