"""The Triton interface of `<model>_denoiser`: tickets and segments.

A request first takes a ticket (operation ``acquire``), which reserves its slots and makes its
LoRAs resident; it may have prompts encoded (``encode``) by the text encoders that take LoRAs, the
first of them in one call with ``acquire``; it then sends *segments*, a few steps of one sequence
each, and at last returns the ticket (``release``). Operation ``loras`` lists the LoRA folder and
needs no ticket. All arrays are float32; C, h, w are the latents' channels and sides, K the steps
that the segment brings, L tokens, D the text encoder's width.
"""

from __future__ import annotations

from closeup.tensors import TritonTensor

ACQUIRE = "acquire"
RELEASE = "release"
ENCODE = "encode"
SEGMENT = "segment"
LORAS = "loras"

#: What each operation cannot do without.
NEEDED = {
    ACQUIRE: ("slots", "loras"),
    RELEASE: ("ticket",),
    ENCODE: ("ticket", "encoder", "input_ids"),
    SEGMENT: ("ticket", "sample", "context", "timestep", "input_scale", "step"),
}

# Beside the denoiser's model.onnx where it is small: the same graph without LoRA inputs.
PLAIN_NAME = "plain.onnx"

_F = "TYPE_FP32"


def _optional(name: str, data_type: str, *dims: int) -> TritonTensor:
    return TritonTensor(name=name, data_type=data_type, dims=dims, optional=True)


DENOISER_INPUTS: tuple[TritonTensor, ...] = (
    # every operation
    TritonTensor(name="operation", data_type="TYPE_STRING", dims=(1,)),
    _optional("ticket", "TYPE_INT64", 1),
    # acquire: slots wanted, and LoRAs as one JSON list of [id, weight]
    _optional("slots", "TYPE_INT64", 1),
    _optional("loras", "TYPE_STRING", 1),
    # encode, or with acquire: which text encoder, and token ids
    _optional("encoder", "TYPE_STRING", 1),
    _optional("input_ids", "TYPE_INT64", -1, -1),  # (prompts, L)
    # segment
    _optional("sample", _F, -1, -1, -1),  # (C, h, w)
    _optional("memory", _F, 2, -1, -1, -1),  # (2, C, h, w); zeros when left out
    _optional("context", _F, -1, -1, -1),  # (rows, L, D): negative and prompt, or prompt alone
    _optional("pooled", _F, -1, -1),  # (rows, P), families that have it
    _optional("time_ids", _F, -1, 6),  # (rows, 6), SDXL
    _optional("guidance_embed", _F, -1),  # (rows,), FLUX.1 dev
    _optional("guidance", _F, 1),  # used with two rows
    # seconds after which a step's end also ends the segment; without it all steps are done
    _optional("budget_s", _F, 1),
    _optional("timestep", _F, -1),  # (K,)
    _optional("input_scale", _F, -1),  # (K,)
    _optional("step", _F, -1, 3, 5),  # (K, 3, 5)
    _optional("noise", _F, -1, -1, -1, -1),  # (K, C, h, w); zeros when left out
    _optional("mask", _F, -1, 1, -1, -1),  # (1 or K, 1, h, w); ones when left out
    _optional("known", _F, -1, -1, -1),  # (C, h, w), with mask
    _optional("known_noise", _F, -1, -1, -1),  # (C, h, w), with mask
    _optional("known_step", _F, -1, 2),  # (K, 2), with mask
)

DENOISER_OUTPUTS: tuple[TritonTensor, ...] = (
    TritonTensor(name="ticket", data_type="TYPE_INT64", dims=(1,)),  # acquire
    TritonTensor(name="warnings", data_type="TYPE_STRING", dims=(1,)),  # acquire; JSON list
    TritonTensor(name="loras", data_type="TYPE_STRING", dims=(1,)),  # loras; JSON list of
    # {"id", "bytes", "networks"}: networks it adapts, null while it is not in memory
    TritonTensor(name="encoded_context", data_type=_F, dims=(-1, -1, -1)),  # encode, acquire
    TritonTensor(name="encoded_pooled", data_type=_F, dims=(-1, -1)),  # encode, acquire
    TritonTensor(name="steps_done", data_type="TYPE_INT64", dims=(1,)),  # segment
    TritonTensor(name="next_sample", data_type=_F, dims=(-1, -1, -1)),
    TritonTensor(name="next_memory", data_type=_F, dims=(2, -1, -1, -1)),
)
