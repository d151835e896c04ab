"""Tables that are written into other files, so that they cannot drift from the code.

``python -m closeup.tables`` rewrites the README's table of request fields; a test compares.
"""

from __future__ import annotations

from pathlib import Path

from closeup.fields import FIELDS, Kind

README = Path(__file__).resolve().parent.parent / "README.md"
BEGIN = "<!-- fields: written by `make tables`, do not edit -->"
END = "<!-- end of fields -->"


def fields_table() -> str:
    """Return the request fields as a Markdown table."""
    rows = ["| field | type | allowed | default | meaning |", "|---|---|---|---|---|"]
    for field in FIELDS:
        kind = "picture" if field.kind is Kind.IMAGE else field.kind.value
        allowed = "" if field.kind in (Kind.BOOL, Kind.IMAGE) else field.allowed
        if field.kind is Kind.IMAGE:
            allowed = field.allowed
        rows.append(
            f"| `{field.name}` | {kind} | {allowed} | {field.default} | {field.doc} |"
        )
    return "\n".join(rows)


def with_table(text: str) -> str:
    """Return the README's text with the present table between its markers."""
    head, _, rest = text.partition(BEGIN)
    _, _, tail = rest.partition(END)
    return f"{head}{BEGIN}\n{fields_table()}\n{END}{tail}"


def main() -> None:
    """Rewrite the README."""
    README.write_text(with_table(README.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
