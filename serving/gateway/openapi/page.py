"""The OpenAPI document as a page for people, which needs nothing from elsewhere."""

import html
import json
from typing import Any

Schema = dict[str, Any]


def page(document: Schema) -> str:
    """Returns the document as HTML."""
    lines = [
        "<!doctype html><html lang=en><meta charset=utf-8><title>mixtral-jax</title><style>"
        "body{font:16px/1.5 sans-serif;max-width:60em;margin:2em auto;padding:0 1em}"
        "td{vertical-align:top;padding:.2em 1em .2em 0;border-top:1px solid #ccc}"
        "code{white-space:nowrap}</style>",
        f"<h1>mixtral-jax {html.escape(document['info']['version'])}</h1>",
        *(f"<p>{html.escape(text)}" for text in document["info"]["description"].split("\n\n")),
        "<p>The same for programs: <a href=/openapi.json>/openapi.json</a><h2>Routes</h2><table>",
    ]
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            lines.append(
                f"<tr><td><code>{method.upper()} {html.escape(path)}</code>"
                f"<td>{html.escape(operation['summary'])}"
            )
    lines.append("</table>")
    for name, schema in document["components"]["schemas"].items():
        lines.append(f"<h2 id={name}>{name}</h2><p>{html.escape(schema.get('description', ''))}")
        lines.append("<table>")
        for field, value in schema.get("properties", {}).items():
            needed = " (required)" if field in schema.get("required", ()) else ""
            lines.append(
                f"<tr><td><code>{html.escape(field)}</code>{needed}<td>{_type_of(value)}"
                f"<td>{html.escape(value.get('description', ''))}"
            )
        lines.append("</table>")
    return "".join(lines)


def _type_of(schema: Schema) -> str:
    if "$ref" in schema:
        name = html.escape(schema["$ref"].rpartition("/")[2])
        return f'<a href="#{name}">{name}</a>'
    if options := schema.get("anyOf"):
        return " or ".join(_type_of(option) for option in options)
    if "const" in schema or "enum" in schema:
        values = schema.get("enum", [schema.get("const")])
        return html.escape(", ".join(json.dumps(value) for value in values))
    if schema.get("type") == "array":
        return f"list of {_type_of(schema.get('items', {}))}"
    low, high = schema.get("minimum"), schema.get("maximum")
    limits = "" if low is None and high is None else f" {low} to {high}"
    return html.escape(f"{schema.get('type', 'anything')}{limits}")
