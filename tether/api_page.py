"""The page that shows the HTTP API to people: the OpenAPI document as plain HTML, which needs nothing from anywhere else."""

from __future__ import annotations

import html
import json
from collections.abc import Iterator
from typing import Any

_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }
code, pre { font: 14px/1.4 ui-monospace, monospace; } pre { background: #8881; padding: .7rem; overflow: auto; }
h2 code { font-size: 1.1rem; } table { border-collapse: collapse; } td { padding: .1rem 1rem .1rem 0; vertical-align: top; }
details { margin: .3rem 0; } summary { cursor: pointer; } :root { color-scheme: light dark; }
"""


def render(document: dict[str, Any]) -> str:
    """Return an OpenAPI document as one HTML page."""
    info = document["info"]
    title = html.escape(f"{info['title']} {info['version']}")
    parts = "\n".join(_operations(document))
    return (
        f"<!doctype html><html lang=en><meta charset=utf-8><title>{title}</title><style>{_STYLE}</style>"
        f"<h1>{title}</h1><p>{html.escape(info.get('summary', ''))} "
        'The same as a document for programs: <a href="openapi.json">openapi.json</a>.</p>'
        f"{parts}<h2>Schemas</h2>{''.join(_schemas(document))}</html>"
    )


def _operations(document: dict[str, Any]) -> Iterator[str]:
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            yield f"<h2><code>{method.upper()} {html.escape(path)}</code></h2>"
            yield f"<p>{html.escape(operation.get('description', ''))}</p>"
            if parameters := operation.get("parameters"):
                rows = "".join(
                    f"<tr><td><code>{html.escape(p['name'])}</code><td>in {p['in']}"
                    f"<td>{html.escape(p.get('description') or p['schema'].get('description', ''))}"
                    for p in parameters
                )
                yield f"<table>{rows}</table>"
            if body := operation.get("requestBody"):
                for kind, content in body["content"].items():
                    yield f"<p>Body: <code>{html.escape(kind)}</code>, {_reference(content.get('schema', {}))}</p>"
            answers = "".join(
                f"<tr><td><code>{status}</code><td>{html.escape(answer['description'])}"
                for status, answer in operation["responses"].items()
            )
            yield f"<details><summary>Answers</summary><table>{answers}</table></details>"


def _schemas(document: dict[str, Any]) -> Iterator[str]:
    for name, schema in document.get("components", {}).get("schemas", {}).items():
        text = html.escape(json.dumps(schema, indent=2))
        yield f'<details id="{html.escape(name)}"><summary><code>{html.escape(name)}</code></summary><pre>{text}</pre></details>'


def _reference(schema: dict[str, Any]) -> str:
    name = str(schema.get("$ref", "")).rpartition("/")[2]
    return f'<a href="#{html.escape(name)}"><code>{html.escape(name)}</code></a>' if name else "any JSON"
