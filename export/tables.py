"""What is written into other files from the code, so that it cannot drift.

``python -m export.tables`` rewrites the README's table of request fields and the configuration
of `generate` and `generate_stream`; a test compares.
"""

from __future__ import annotations

from pathlib import Path

from closeup.fields import FIELDS, Kind
from closeup.tensors import TritonTensor
from export.config import TritonConfig, config_text

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"
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
        rows.append(f"| `{field.name}` | {kind} | {allowed} | {field.default} | {field.doc} |")
    return "\n".join(rows)


def with_table(text: str) -> str:
    """Return the README's text with the present table between its markers."""
    head, _, rest = text.partition(BEGIN)
    _, _, tail = rest.partition(END)
    return f"{head}{BEGIN}\n{fields_table()}\n{END}{tail}"


def generate_config(name: str) -> str:
    """Return the config.pbtxt of ``generate`` or ``generate_stream``."""
    streaming = name == "generate_stream"
    inputs = tuple(
        TritonTensor(name=field.name, data_type=field.kind.triton_type, dims=(1,), optional=True)
        for field in FIELDS
    )
    names = ["image", "info", "stage_image"] + ["event", "preview"] * streaming
    single = ("info", "event", "preview")
    outputs = tuple(
        TritonTensor(name=output, data_type="TYPE_STRING", dims=(1 if output in single else -1,))
        for output in names
    )
    head = "# Written by `make tables` from closeup/fields.py, do not edit.\n"
    return head + config_text(
        TritonConfig(
            name=name,
            backend="python",
            inputs=inputs,
            outputs=outputs,
            kind="KIND_CPU",
            decoupled=streaming,
        )
    )


def config_path(name: str) -> Path:
    """Return where the configuration of ``name`` is committed."""
    return ROOT / "model_repository" / name / "config.pbtxt"


def main() -> None:
    """Rewrite the files."""
    README.write_text(with_table(README.read_text(encoding="utf-8")), encoding="utf-8")
    for name in ("generate", "generate_stream"):
        config_path(name).write_text(generate_config(name), encoding="utf-8")


if __name__ == "__main__":
    main()
