"""Waits until the API server serves every kind of kvfleet.io/v1alpha1 named on the command line.

A CRD that was created a moment ago is not served yet: in clusters with several API servers it takes seconds. The chart
runs this as a hook between its CRDs and its first objects of their kinds, inside the image, with the standard library.
"""

import json
import os
import ssl
import sys
import time
import urllib.request
from pathlib import Path

ACCOUNT = Path(os.environ.get("SERVICE_ACCOUNT", "/var/run/secrets/kubernetes.io/serviceaccount"))
TIMEOUT_S = float(os.environ.get("TIMEOUT_S", "120"))
HOST, PORT = os.environ["KUBERNETES_SERVICE_HOST"], os.environ["KUBERNETES_SERVICE_PORT"]
URL = f"https://{f'[{HOST}]' if ':' in HOST else HOST}:{PORT}/apis/kvfleet.io/v1alpha1"


def served_kinds():
    """The kinds in the API server's discovery document."""
    token = (ACCOUNT / "token").read_text().strip()
    request = urllib.request.Request(URL, headers={"Authorization": f"Bearer {token}"})
    context = ssl.create_default_context(cafile=str(ACCOUNT / "ca.crt"))
    with urllib.request.urlopen(request, timeout=10, context=context) as answer:
        return {resource["kind"] for resource in json.load(answer)["resources"]}


deadline = time.monotonic() + TIMEOUT_S
while True:
    try:
        missing = set(sys.argv[1:]) - served_kinds()
        if not missing:
            sys.exit(0)
        problem = f"not served yet: {', '.join(sorted(missing))}"
    except (OSError, ValueError) as error:  # refused, 404 before the first CRD, an answer cut short
        problem = f"{URL}: {error}"
    if time.monotonic() > deadline:
        sys.exit(f"{problem}; install the CRDs (crds.enabled=true, or crds/ of the repository), then run helm upgrade")
    time.sleep(0.5)
