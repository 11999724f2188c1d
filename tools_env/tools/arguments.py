"""Checks arguments against the subset of JSON schema that the tools use, with messages for the model."""

from typing import Any

from tools_env.errors import BadArguments

_TYPES = {"string": str, "integer": int, "array": list, "object": dict, "boolean": bool, "number": (int, float)}


def check_arguments(schema: dict[str, Any], value: Any, where: str = "arguments") -> None:
    """Raises BadArguments for the first invalid field: type, enum, required, bounds, unknown names."""
    if "anyOf" in schema:
        of_type = [choice for choice in schema["anyOf"] if isinstance(value, _TYPES[choice["type"]])]
        if not of_type:
            names = " or ".join(choice["type"] for choice in schema["anyOf"])
            raise BadArguments(f"{where} must be {names}, got {type(value).__name__}")
        schema = of_type[0]
    kind = schema.get("type")
    if kind and (not isinstance(value, _TYPES[kind]) or (isinstance(value, bool) and kind != "boolean")):
        raise BadArguments(f"{where} must be {'an' if kind[0] in 'aeio' else 'a'} {kind}, got {type(value).__name__}")
    if "enum" in schema and value not in schema["enum"]:
        raise BadArguments(f"{where} must be one of {', '.join(schema['enum'])}, got {value}")
    if kind == "integer" and value < schema.get("minimum", value):
        raise BadArguments(f"{where} must be at least {schema['minimum']}, got {value}")
    if kind == "integer" and value > schema.get("maximum", value):
        raise BadArguments(f"{where} must be at most {schema['maximum']}, got {value}")
    if kind == "string" and len(value) < schema.get("minLength", 0):
        raise BadArguments(f"{where} is empty")
    if kind == "array":
        if len(value) < schema.get("minItems", 0):
            raise BadArguments(f"{where} is empty")
        if len(value) > schema.get("maxItems", len(value)):
            raise BadArguments(f"{where} has {len(value)} entries, at most {schema['maxItems']} are allowed")
        for i, item in enumerate(value):
            check_arguments(schema.get("items", {}), item, f"{where}[{i}]")
    if kind == "object":
        fields = schema.get("properties", {})
        inside = "" if where == "arguments" else f"{where}."
        for name in schema.get("required", ()):
            if name not in value:
                raise BadArguments(f"{inside}{name} is missing")
        for name, item in value.items():
            if name not in fields:
                raise BadArguments(f"unknown field {inside}{name}; the fields are {', '.join(fields)}")
            check_arguments(fields[name], item, inside + name)
