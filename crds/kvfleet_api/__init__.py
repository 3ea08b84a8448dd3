"""The kvfleet API (group kvfleet.io, v1alpha1): the one truth about what a manifest may say.

- `modelpool`, `routingpolicy`, `fleetrouter`, `acceleratorprofile`: the four custom resources as pydantic models.
- `cost`: what a worker costs in seconds and joules, resolved from an AcceleratorProfile.
- `fleetconfig`: the compiled configuration a router loads; `compile` makes it out of the four kinds.
- `schema`: lowers the models to structural CRD schemas; `manifests` reads YAML with errors that name file and field.

Nothing in here does network I/O.
"""

GROUP = "kvfleet.io"
VERSION = "v1alpha1"
API_VERSION = f"{GROUP}/{VERSION}"
