"""The committed chart: generated files up to date, values and templates in step, one version everywhere."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import chart
import pytest
import yaml
from chart_values import leaves, read_values

from kvfleet import __version__
from kvfleet_api.fleetrouter import DEFAULT_ROUTER_IMAGE

JSON_TYPES: dict[str, tuple[type, ...]] = {
    "boolean": (bool,),
    "integer": (int,),
    "string": (str,),
    "array": (list,),
    "object": (dict,),
    "null": (type(None),),
}


@pytest.fixture(scope="module")
def chart_folder(repository: Path) -> Path:
    return repository / chart.CHART


def test_generated_files_are_up_to_date(repository: Path) -> None:
    for path, content in chart.outputs(repository).items():
        assert (repository / path).read_text() == content, f"{path}: run `make generate`"


@pytest.mark.parametrize("source", chart.COPIES, ids=str)
def test_the_chart_holds_copies_of_exactly_the_source_files(repository: Path, source: Path) -> None:
    copies = {path.name: path.read_text() for path in (repository / chart.COPIES[source]).iterdir()}
    assert copies == {path.name: path.read_text() for path in (repository / source).glob("*.yaml")}
    assert len(copies) >= 4


def test_a_changed_source_changes_what_is_generated(repository: Path, tmp_path: Path) -> None:
    for folder in (chart.CHART, chart.CRDS):
        shutil.copytree(repository / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__"))
    crd = next((tmp_path / chart.CRDS).glob("*fleetrouters.yaml"))
    crd.write_text(crd.read_text().replace("maximum: 1000\n", "maximum: 999\n"))
    values = tmp_path / chart.CHART / "values.yaml"
    values.write_text(values.read_text().replace("# The operator.\n", "# The one operator.\n"))
    before, after = chart.outputs(repository), chart.outputs(tmp_path)
    changed = {str(path) for path in after if after[path] != before[path]}
    assert changed == {f"helm/kvfleet/files/crds/{crd.name}", "helm/kvfleet/values.schema.json"}


def test_a_readme_without_marks_is_refused() -> None:
    with pytest.raises(chart.ChartError, match="lacks the marks"):
        chart.with_table("# no marks\n", "")


def test_a_spec_of_an_unknown_kind_is_refused(repository: Path) -> None:
    with pytest.raises(chart.ChartError, match="no file in crds/ defines that kind"):
        chart.crd_spec_schema(repository, "Nothing")


def test_defaults_fit_their_own_schema(chart_folder: Path) -> None:
    schema = json.loads((chart_folder / "values.schema.json").read_text())
    for value in leaves(read_values((chart_folder / "values.yaml").read_text())):
        node: dict[str, Any] = schema
        for key in value.path:
            node = node["properties"][key]
        if "enum" in node:
            assert value.default in node["enum"], value.path
            continue
        types = [node["type"]] if isinstance(node["type"], str) else node["type"]
        allowed = tuple(python_type for name in types for python_type in JSON_TYPES[name])
        assert isinstance(value.default, allowed), value.path
        if isinstance(value.default, str):
            assert re.search(node.get("pattern", ""), value.default), value.path


def test_templates_read_only_documented_values_and_every_documented_value_is_read(chart_folder: Path) -> None:
    documented = {".".join(value.path) for value in leaves(read_values((chart_folder / "values.yaml").read_text()))}
    text = "\n".join(path.read_text() for path in (chart_folder / "templates").rglob("*") if path.is_file())
    read = set(re.findall(r"\.Values\.([A-Za-z.]*[A-Za-z])", text))
    # `with .Values.monitoring.serviceMonitor` reads what follows as `.enabled`.
    sections = {name for name in read if name not in documented}
    unknown = {s for s in sections if not any(name.startswith(f"{s}.") for name in documented)}
    assert unknown == set()
    unread = {name for name in documented - read if not any(name.startswith(f"{s}.") for s in sections)}
    assert unread == set()


def test_chart_program_and_default_image_have_one_version(chart_folder: Path) -> None:
    metadata = yaml.safe_load((chart_folder / "Chart.yaml").read_text())
    image = yaml.safe_load((chart_folder / "values.yaml").read_text())["image"]
    assert metadata["version"] == metadata["appVersion"] == __version__
    assert f"{image['registry']}/{image['repository']}:{__version__}" == DEFAULT_ROUTER_IMAGE
