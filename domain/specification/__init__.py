"""Specifications: one meaning in Python, SQL, JSON and words."""

from leftfold.domain.specification.document import (
    InvalidSpecification,
    OpaqueSpecification,
    json_schema,
)
from leftfold.domain.specification.explanation import Explanation
from leftfold.domain.specification.tree import (
    ALWAYS,
    NEVER,
    Attribute,
    PrivateAttribute,
    Specification,
    UnknownAttribute,
    all_of,
    any_of,
    attr,
    satisfies,
)
from leftfold.domain.specification.values import InvalidValue, UnlikeTypes

__all__ = [
    "ALWAYS",
    "NEVER",
    "Attribute",
    "Explanation",
    "InvalidSpecification",
    "InvalidValue",
    "OpaqueSpecification",
    "PrivateAttribute",
    "Specification",
    "UnknownAttribute",
    "UnlikeTypes",
    "all_of",
    "any_of",
    "attr",
    "json_schema",
    "satisfies",
]
