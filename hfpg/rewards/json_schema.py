"""JSON schemas as rules: what a schema lacks is said when the rule is made, and its patterns have a time limit."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextvars import ContextVar
from typing import Any

import regex  # type: ignore[import-untyped]

from hfpg.config import ConfigError, require


DEADLINE: ContextVar[float] = ContextVar("deadline")  # of the text that is compared with a schema now


def schema_checker(schema: Any, seconds: float) -> Callable[[Any], bool]:
    """A function that says whether a value fits; TimeoutError where the schema's patterns take longer than `seconds`.

    References to other documents are never fetched.

    Raises:
        ConfigError: it is no schema, refers to what it does not hold, or has a pattern that is none or whose time
            cannot be limited.
    """
    from jsonschema import SchemaError, validators  # type: ignore[import-untyped]
    from referencing import Registry

    kind = validators.validator_for(schema)
    try:
        kind.check_schema(schema)
    except SchemaError as error:
        raise ConfigError(f"json_valid: this is no JSON schema: {error.message}") from None
    _check_parts(schema)
    kept = {name: check for name, check in KEYWORDS.items() if name in kind.VALIDATORS}
    fits = validators.extend(kind, kept)(schema, registry=Registry()).is_valid

    def checker(value: Any) -> bool:
        token = DEADLINE.set(time.monotonic() + seconds)
        try:
            return fits(value)
        finally:
            DEADLINE.reset(token)

    return checker


def _check_parts(schema: Any) -> None:
    """Every reference of a schema, and of what it refers to, leads somewhere; every pattern is one."""
    from jsonschema_specifications import REGISTRY  # type: ignore[import-untyped]
    from referencing import Resource, exceptions
    from referencing.jsonschema import DRAFT202012, specification_with

    dialect = schema.get("$schema", "") if isinstance(schema, Mapping) else ""
    kind = specification_with(dialect, default=DRAFT202012)
    seen: set[int] = set()
    words: set[str] = set()

    def walk(resource: Any, resolver: Any) -> None:
        part = resource.contents
        if id(part) in seen or not isinstance(part, Mapping):
            return
        seen.add(id(part))
        words.update(part)
        _check_patterns(part)
        for word in ("$ref", "$dynamicRef"):
            if isinstance(part.get(word), str):
                try:
                    found = resolver.lookup(part[word])
                except (exceptions.Unresolvable, exceptions.Unretrievable, ValueError):
                    raise ConfigError(
                        f"json_valid: the schema's {word} {part[word]!r} leads nowhere in it, and other documents are "
                        "never fetched; put what it means into $defs and refer to '#/$defs/NAME'"
                    ) from None
                walk(Resource.from_contents(found.contents, default_specification=kind), found.resolver)
        for child in resource.subresources():
            walk(child, resolver.in_subresource(child))

    root = kind.create_resource(schema)
    walk(root, REGISTRY.resolver_with_root(root))
    require(
        not {"unevaluatedProperties", "patternProperties"} <= words,
        "json_valid: a schema with unevaluatedProperties and patternProperties would search without a time limit; "
        "use additionalProperties in place of unevaluatedProperties",
    )


def _check_patterns(part: Mapping[str, Any]) -> None:
    own = [part["pattern"]] if isinstance(part.get("pattern"), str) else []
    for pattern in [*own, *part.get("patternProperties", {})]:
        try:
            regex.compile(pattern)
        except regex.error as error:
            raise ConfigError(f"json_valid: {pattern!r} is no regular expression: {error}") from None


# ── jsonschema's keywords that search, with the time that is left


def _found(pattern: str, text: str) -> bool:
    left = DEADLINE.get() - time.monotonic()
    if left <= 0:
        raise TimeoutError
    return regex.search(pattern, text, timeout=left) is not None


def _error(why: str) -> Any:
    from jsonschema import ValidationError

    return ValidationError(why)


def _pattern(validator: Any, pattern: str, value: Any, schema: Any) -> Iterator[Any]:
    if validator.is_type(value, "string") and not _found(pattern, value):
        yield _error("a text does not match its pattern")


def _pattern_properties(validator: Any, patterns: Mapping[str, Any], value: Any, schema: Any) -> Iterator[Any]:
    if validator.is_type(value, "object"):
        for pattern, part in patterns.items():
            for key, item in value.items():
                if _found(pattern, key):
                    yield from validator.descend(item, part, path=key, schema_path=pattern)


def _additional_properties(validator: Any, allowed: Any, value: Any, schema: Mapping[str, Any]) -> Iterator[Any]:
    if not validator.is_type(value, "object"):
        return
    known, patterns = schema.get("properties", {}), schema.get("patternProperties", {})
    for key, item in value.items():
        if key in known or any(_found(pattern, key) for pattern in patterns):
            continue
        if validator.is_type(allowed, "object"):
            yield from validator.descend(item, allowed, path=key)
        elif not allowed:
            yield _error(f"the property {key!r} is not allowed")


KEYWORDS = {
    "pattern": _pattern,
    "patternProperties": _pattern_properties,
    "additionalProperties": _additional_properties,
}
