"""The VAE's graphs: their attention goes through the queries in parts."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import torch

from closeup.engines import open_engine
from demo.train_vae import build_vae
from export.graphs import export_graph
from export.vae import QUERY_PARTS, vae_decoder_graph


def test_vae_attention_never_holds_the_weights_of_all_queries_at_once(tmp_path: Path) -> None:
    torch.manual_seed(0)
    vae = build_vae().eval()
    latents = torch.randn(2, 4, 7, 9)  # 63 latents: parts of 7 and of 8
    with torch.no_grad():
        expected = vae.decode(latents / vae.config.scaling_factor).sample.numpy()
    path = tmp_path / "model.onnx"
    export_graph(vae_decoder_graph(vae), path, "vae_decoder")
    found = open_engine(path).run({"latents": latents.numpy()})["image"]
    # Float32 products in another order; the pictures' own spread is near 0.3.
    np.testing.assert_allclose(found, expected, atol=2e-5)
    assert expected.std() > 0.05
    graph = onnx.load(path).graph
    kinds = [node.op_type for node in graph.node]
    assert kinds.count("Softmax") == QUERY_PARTS
    concatenated = [node for node in graph.node if node.op_type == "Concat"]
    assert any(len(node.input) == QUERY_PARTS for node in concatenated)
