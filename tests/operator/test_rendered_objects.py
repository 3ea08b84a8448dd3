"""Golden objects: what the operator applies for typical fleets, whole and reviewable.

`pytest tests/operator/test_rendered_objects.py --update-golden` writes them anew; review the difference.
"""

from pathlib import Path

import pytest
import yaml

from kvfleet_api.manifests import parse
from kvfleet_operator.render import render

GOLDEN = Path(__file__).parent / "golden"
CASES = sorted(path.stem for path in (GOLDEN / "cases").glob("[!_]*.yaml"))
PROFILES = (GOLDEN / "cases" / "_profiles.yaml").read_text()


def text_of(case):
    manifests = parse(PROFILES + (GOLDEN / "cases" / f"{case}.yaml").read_text(), namespace="default")
    return yaml.safe_dump_all(render(manifests), sort_keys=False, width=120)


@pytest.mark.parametrize("case", CASES)
def test_rendered_objects_are_the_golden_ones(case, request):
    golden = GOLDEN / f"{case}.yaml"
    if request.config.getoption("--update-golden"):
        golden.write_text(text_of(case))
    assert text_of(case) == golden.read_text()


def test_every_golden_file_has_a_case():
    assert CASES
    assert sorted(path.stem for path in GOLDEN.glob("*.yaml")) == CASES


@pytest.mark.parametrize("case", CASES)
def test_rendering_twice_gives_equal_bytes(case):
    assert text_of(case) == text_of(case)


def test_objects_come_in_the_order_in_which_they_are_needed():
    kinds = [manifest["kind"] for manifest in yaml.safe_load_all(text_of("router-secured"))]
    assert kinds.index("ServiceAccount") < kinds.index("RoleBinding") < kinds.index("ConfigMap")
    assert kinds.index("ConfigMap") < kinds.index("Service") < kinds.index("Deployment")


def test_a_misfit_pod_template_is_refused_with_its_field():
    text = """
apiVersion: kvfleet.io/v1alpha1
kind: ModelPool
metadata: {name: p}
spec:
  model: {name: m-8b}
  accelerator: {profileRef: nvidia-h100-80gb}
  podTemplate: {spec: {containers: [{image: x}]}}
"""
    with pytest.raises(ValueError, match=r"ModelPool default/p: spec\.podTemplate\.spec\.containers\[0\]: .*`name`"):
        render(parse(PROFILES + text))


def test_a_missing_profile_is_named_with_those_that_exist():
    case = (GOLDEN / "cases" / "pool-plain.yaml").read_text().replace("nvidia-h100-80gb", "h900")
    with pytest.raises(ValueError, match=r"profileRef: no AcceleratorProfile 'h900'.*nvidia-h100-80gb"):
        render(parse(PROFILES + case))
