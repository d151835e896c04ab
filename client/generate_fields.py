"""Write closeup_client/fields.py from closeup.fields, so that client and server cannot differ.

The client is installed without the server, so it carries the table as a file of its own:
``python client/generate_fields.py`` writes it (from the repository's root), a test compares it.
"""

from __future__ import annotations

import sys
from pathlib import Path

TARGET = Path(__file__).parent / "closeup_client" / "fields.py"

_HEAD = '''"""The request fields. Written by client/generate_fields.py: do not edit."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum


class Kind(str, Enum):
    """A field's type."""

    STRING = "string"
    IMAGE = "image"
    INT = "int"
    FLOAT = "float"
    BOOL = "bool"


@dataclass(frozen=True, kw_only=True, slots=True)
class Field:
    """One request field.

    Attributes:
        name: input tensor, JSON key and keyword.
        kind: its type.
        datatype: of its tensor, as the KServe protocol spells it.
        doc: one line for people.
        default: what happens without it, in words.
        allowed: the range, in words; empty when free.
        minimum: smallest value (for strings: characters), inclusive.
        maximum: largest value (for strings: characters), inclusive.
        multiple_of: values must be multiples of this.
        choices: the only values; empty when free.
    """

    name: str
    kind: Kind
    datatype: str
    doc: str
    default: str
    allowed: str = ""
    minimum: float | None = None
    maximum: float | None = None
    multiple_of: int | None = None
    choices: tuple[str, ...] = ()


# fmt: off
FIELDS: tuple[Field, ...] = (
'''

_TAIL = """)
# fmt: on

FIELD_BY_NAME: Mapping[str, Field] = {field.name: field for field in FIELDS}
"""


def source_from_fields() -> str:
    """The text of closeup_client/fields.py for the server's current table."""
    from closeup.fields import FIELDS

    rows: list[str] = []
    for field in FIELDS:
        wire = field.kind.triton_type.removeprefix("TYPE_").replace("STRING", "BYTES")
        values = {
            "name": _quoted(field.name),
            "kind": f"Kind.{field.kind.name}",
            "datatype": _quoted(wire),
            "doc": _quoted(field.doc),
            "default": _quoted(field.default),
            "allowed": _quoted(field.allowed),
            "minimum": f"{field.minimum!r}",
            "maximum": f"{field.maximum!r}",
            "multiple_of": f"{field.multiple_of!r}",
            "choices": _tuple(field.choices),
        }
        dull = ("None", '""', "()")
        given = {key: text for key, text in values.items() if text not in dull}
        rows.append("    Field(\n")
        rows += [f"        {key}={text},{_long(key, text)}\n" for key, text in given.items()]
        rows.append("    ),\n")
    return _HEAD + "".join(rows) + _TAIL


def _quoted(text: str) -> str:
    escaped = text.replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escaped}"'


def _tuple(values: tuple[str, ...]) -> str:
    comma = "," if len(values) == 1 else ""
    return f"({', '.join(map(_quoted, values))}{comma})"


def _long(key: str, text: str) -> str:
    return "  # noqa: E501" if len(f"        {key}={text},") > 100 else ""


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    TARGET.write_text(source_from_fields(), encoding="utf-8")
