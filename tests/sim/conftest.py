"""Helper modules of these tests (`engine_workloads`, `sim_client`, …) are imported by name; importlib mode adds no path."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
