"""Files made from the code say what the code says."""

from __future__ import annotations

import re
import subprocess

import pytest
from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2 as pb

from closeup.fields import FIELDS
from export.tables import README, config_path, fields_table, generate_config, with_table
from tests.paths import ROOT


@pytest.mark.parametrize("name", ["generate", "generate_stream"])
def test_served_configuration_is_the_one_that_the_fields_give(name: str) -> None:
    text = config_path(name).read_text(encoding="utf-8")
    assert text == generate_config(name), "run `make tables`"
    config = text_format.Parse(text, pb.ModelConfig())
    assert config.name == name
    assert [tensor.name for tensor in config.input] == [field.name for field in FIELDS]
    for tensor, field in zip(config.input, FIELDS, strict=True):
        assert tensor.optional
        assert list(tensor.dims) == [1]
        assert pb.DataType.Name(tensor.data_type) == field.kind.triton_type
    assert config.model_transaction_policy.decoupled == (name == "generate_stream")
    assert config.max_batch_size == 0
    assert config.instance_group[0].kind == pb.ModelInstanceGroup.KIND_CPU


def test_readme_has_the_table_that_the_fields_give() -> None:
    text = README.read_text(encoding="utf-8")
    assert with_table(text) == text, "run `make tables`"
    rows = re.findall(r"^\| `(\w+)` \|", fields_table(), flags=re.MULTILINE)
    assert rows == [field.name for field in FIELDS]


def test_make_help_lists_every_documented_target() -> None:
    listed = subprocess.run(["make", "help"], cwd=ROOT, capture_output=True, text=True, check=True)
    targets = {line.split()[0] for line in listed.stdout.splitlines()}
    assert {"setup", "run", "serve", "test", "lint", "bench", "demo-train", "tables"} <= targets
