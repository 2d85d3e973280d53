"""``docs/kubernetes-values.md``: every value of the chart with its type, its default and its meaning."""

from __future__ import annotations

from ops.generators.values import ValueRow, value_rows

_HEADER = """\
# Every value of the Helm chart

Written by `ops/generate` from the model of `helm/llm-cluster/values.yaml`; [kubernetes.md](kubernetes.md) says what to
do with them. A path with `[]` is a setting of each item of a list; a given list replaces the default as a whole. What
has snake_case is a setting of the product, as in the configuration file. An unknown key is an error.
"""
_ALONE = "Without a section"


def files() -> dict[str, str]:
    return {"docs/kubernetes-values.md": values_page()}


def values_page() -> str:
    sections: dict[str, list[ValueRow]] = {_ALONE: []}
    for row in value_rows():
        sections.setdefault(_section(row), []).append(row)
    alone = [name for name, rows in sections.items() if len(rows) == 1 and rows[0].path == name]
    sections[_ALONE] = [row for name in alone for row in sections.pop(name)]
    tables = [
        "\n".join([f"## {name}\n", "| value | type | default | meaning |", "|---|---|---|---|", *map(_line, rows), ""])
        for name, rows in sections.items()
    ]
    return "\n".join([_HEADER, *tables])


def _section(row: ValueRow) -> str:
    return row.path.partition(".")[0].removesuffix("[]")


def _line(row: ValueRow) -> str:
    default = "needed" if row.default == "needed" else f"`{row.default}`"
    cells = (f"`{row.path}`", row.type, default, row.description)
    return "| " + " | ".join(cell.replace("|", "&#124;") for cell in cells) + " |"
