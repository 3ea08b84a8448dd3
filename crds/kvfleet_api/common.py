"""Building blocks of the four kinds: the base model, metadata, conditions, references."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AliasGenerator, BaseModel, ConfigDict, Field
from pydantic.alias_generators import to_camel

DNS_LABEL = r"^[a-z0-9]([-a-z0-9]*[a-z0-9])?$"
Name = Annotated[str, Field(min_length=1, max_length=63, pattern=DNS_LABEL)]
"""An object's name: lower-case letters, digits and dashes (RFC 1123 label)."""
ModelName = Annotated[str, Field(min_length=1, max_length=253, pattern=r"^[A-Za-z0-9][A-Za-z0-9._/:@+-]*$")]
"""The name clients put in `model`: letters, digits and `._/:@+-`."""


class Schema(BaseModel):
    """Base of every API type: camelCase outside, unknown fields refused, frozen once read."""

    model_config = ConfigDict(
        alias_generator=AliasGenerator(alias=to_camel),
        populate_by_name=True,
        extra="forbid",
        frozen=True,
        use_attribute_docstrings=True,
        protected_namespaces=(),
    )


class LenientSchema(Schema):
    """For what others write (status, metadata): unknown fields are ignored."""

    model_config = ConfigDict(extra="ignore")


class OwnerReference(LenientSchema):
    api_version: str
    kind: str
    name: str
    uid: str


class ObjectMeta(LenientSchema):
    """The part of Kubernetes' metadata that kvfleet reads."""

    name: Annotated[str, Field(min_length=1, max_length=253)]
    namespace: str | None = None
    uid: str | None = None
    generation: int | None = None
    resource_version: str | None = None
    labels: dict[str, str] = {}
    annotations: dict[str, str] = {}
    creation_timestamp: str | None = None
    deletion_timestamp: str | None = None


class Condition(LenientSchema):
    """A condition as `metav1.Condition` has it."""

    type: Annotated[str, Field(min_length=1, max_length=316)]
    """What the condition is about, for example `Ready`."""
    status: Literal["True", "False", "Unknown"]
    reason: Annotated[str, Field(min_length=1, max_length=1024, pattern=r"^[A-Za-z]([A-Za-z0-9_,:]*[A-Za-z0-9_])?$")]
    """One word in CamelCase, for machines."""
    message: Annotated[str, Field(max_length=32768)] = ""
    """A sentence for people: what is the case and, where something is wrong, what to do."""
    observed_generation: Annotated[int, Field(ge=0)] | None = None
    """The object's generation that this condition speaks about."""
    last_transition_time: str | None = None
    """When `status` last changed (RFC 3339)."""


class Resource(LenientSchema):
    """Fields every custom resource has; subclasses add `spec` and `status`."""

    api_version: str = "kvfleet.io/v1alpha1"
    kind: str = ""
    metadata: ObjectMeta

    @property
    def key(self) -> str:
        """`namespace/name`, or `name` of a cluster-scoped object."""
        return f"{self.metadata.namespace}/{self.metadata.name}" if self.metadata.namespace else self.metadata.name


PodTemplate = dict[str, Any]
"""A partial PodTemplateSpec merged over the generated one (strategic: containers by name)."""
