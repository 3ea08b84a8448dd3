"""Building blocks of the four kinds: the base model, metadata, conditions, references."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AliasGenerator, BaseModel, ConfigDict, Field, GetJsonSchemaHandler
from pydantic.alias_generators import to_camel
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema

from kvfleet_api.constraints import UniqueBy, rules_of

DNS_LABEL = r"^[a-z0-9]([-a-z0-9]*[a-z0-9])?$"
Name = Annotated[str, Field(min_length=1, max_length=63, pattern=DNS_LABEL)]
"""An object's name: lower-case letters, digits and dashes (RFC 1123 label)."""
ModelName = Annotated[str, Field(min_length=1, max_length=253, pattern=r"^[A-Za-z0-9][A-Za-z0-9._/:@+-]*$")]
"""The name clients put in `model`: letters, digits and `._/:@+-`."""


Timestamp = Annotated[str, Field(max_length=64, json_schema_extra={"format": "date-time"})]
"""A point in time (RFC 3339)."""
ShortText = Annotated[str, Field(max_length=1024)]
"""A line of text."""


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

    @classmethod
    def __get_pydantic_json_schema__(cls, schema: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        json_schema = handler.resolve_ref_schema(handler(schema))
        rules = [rule.kubernetes_validation() for rule in rules_of(cls)]
        if rules:
            json_schema["x-kubernetes-validations"] = rules
        return json_schema


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

    name: Name
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
    last_transition_time: Timestamp | None = None
    """When `status` last changed (RFC 3339)."""


Conditions = Annotated[list[Condition], UniqueBy("type"), Field(max_length=32)]
"""An object's conditions, one of each type."""
Annotations = Annotated[dict[str, Annotated[str, Field(max_length=16384)]], Field(max_length=64)]


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
