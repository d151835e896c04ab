"""How LoRA files name their tensors: PEFT, diffusers (new and old), kohya and original styles.

A key is a network's prefix, a module and a part (down, up, alpha). Modules come dotted or with
every dot turned into an underscore (kohya); `closeup.lora_names` finds the layers they mean.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from closeup.lora_files import FileError

DENOISER = "denoiser"
TEXT_ENCODER = "text_encoder"
TEXT_ENCODER_2 = "text_encoder_2"

_DOWN_UP: Mapping[str, str] = {"A": "down", "B": "up", "down": "down", "up": "up"}
_ENDINGS = (
    re.compile(r"(.+)\.lora_(A|B)(?:\.[\w-]+)?\.weight"),  # PEFT, with or without adapter name
    re.compile(r"(.+)\.lora_(down|up)\.weight"),  # kohya
    re.compile(r"(.+)\.lora(?:_linear_layer)?\.(down|up)\.weight"),  # diffusers
    re.compile(r"(.+)_lora\.(down|up)\.weight"),  # diffusers' old attention processors
    re.compile(r"(.+_lora[12])\.(down|up)\.weight"),  # XLabs' attention processors
)
_ALPHA = ".alpha"

# Keys that need more than B(Ax), and how their method is called.
_REFUSED = (
    (re.compile(r"\.hada_"), "LoHa"),
    (re.compile(r"\.lokr_"), "LoKr"),
    (re.compile(r"\.dora_scale$|lora_magnitude_vector"), "DoRA"),
    (re.compile(r"\.lora_mid\."), "Tucker-decomposed LoCon"),
    (re.compile(r"\.b?oft_"), "OFT"),
    (re.compile(r"\.on_input$"), "IA3"),
    (re.compile(r"\.diff(?:_b)?$"), "full-difference"),
    (re.compile(r"\.lora_(?:B|up)(?:\.[\w-]+)?\.bias$"), "bias"),
    (re.compile(r"\.[wb]_norm$"), "norm"),
)

_WRAPPER = "base_model.model."
# The first that fits names the network; the module goes on behind it.
_PREFIXES: tuple[tuple[str, str], ...] = (
    ("unet.", DENOISER),
    ("transformer.", DENOISER),
    ("model.diffusion_model.", DENOISER),
    ("diffusion_model.", DENOISER),
    ("lora_unet_", DENOISER),
    ("lora_transformer_", DENOISER),
    ("text_encoder.", TEXT_ENCODER),
    ("lora_te_", TEXT_ENCODER),
    ("lora_te1_", TEXT_ENCODER),
    ("text_encoders.clip_l.transformer.", TEXT_ENCODER),
    ("cond_stage_model.transformer.", TEXT_ENCODER),
    ("conditioner.embedders.0.transformer.", TEXT_ENCODER),
    ("text_encoder_2.", TEXT_ENCODER_2),
    ("lora_te2_", TEXT_ENCODER_2),
    ("text_encoders.clip_g.transformer.", TEXT_ENCODER_2),
    ("conditioner.embedders.1.", TEXT_ENCODER_2),
)
_T5_PREFIXES = ("text_encoder_3.", "lora_te3_", "text_encoders.t5")
_T5_MODULE = re.compile(r"(?:transformer[._])?encoder[._]block[._]\d+[._]layer[._]")


@dataclass(kw_only=True, slots=True)
class ModuleKeys:
    """The tensors of one adapted module.

    Attributes:
        module: as the file spells it.
        network: ``denoiser``, ``text_encoder`` or ``text_encoder_2``.
        inner: the module within the network, dotted or with underscores.
        down: name of A, (r, in) or (r, in, 1, 1).
        up: name of B, (out, r) or (out, r, 1, 1).
        alpha: name of the scalar, None when there is none.
    """

    module: str
    network: str
    inner: str
    down: str | None = None
    up: str | None = None
    alpha: str | None = None


def group_keys(names: Iterable[str]) -> list[ModuleKeys]:
    """Sort a file's tensor names by module, in the file's order.

    Raises:
        FileError: a name that is no LoRA's, belongs to a method or a text encoder that is not
            served, or a module without one of its two factors.
    """
    names = list(names)
    _refuse_other_methods(names)
    modules: dict[str, ModuleKeys] = {}
    for name in names:
        module, part = _split_key(name)
        if module not in modules:
            network, inner = _split_module(module)
            modules[module] = ModuleKeys(module=module, network=network, inner=inner)
        keys = modules[module]
        if getattr(keys, part) is not None:
            raise FileError(f"has two {part} tensors for the layer {module}.")
        setattr(keys, part, name)
    for keys in modules.values():
        if keys.down is None or keys.up is None:
            lacking = "down (A)" if keys.down is None else "up (B)"
            raise FileError(f"is incomplete: the layer {keys.module} has no {lacking} tensor.")
    if not modules:
        raise FileError("holds no tensors.")
    return list(modules.values())


def _refuse_other_methods(names: Iterable[str]) -> None:
    for name in names:
        for pattern, method in _REFUSED:
            if pattern.search(name):
                raise FileError(
                    f"has {method} weights ({name}), which this server does not apply: only plain "
                    "LoRA on linear layers and 1x1 convolutions is served."
                )


def _split_key(name: str) -> tuple[str, str]:
    if name.endswith(_ALPHA):
        return name.removesuffix(_ALPHA), "alpha"
    for ending in _ENDINGS:
        match = ending.fullmatch(name)
        if match:
            return match[1], _DOWN_UP[match[2]]
    raise FileError(f"has a tensor {name[:120]!r} that is not part of a LoRA this server knows.")


def _split_module(module: str) -> tuple[str, str]:
    """Return the network and the module within it."""
    name = module.removeprefix(_WRAPPER)
    if name.startswith(_T5_PREFIXES):
        raise _t5_error(module)
    if name.startswith("text_model."):  # PEFT around a text encoder alone
        return TEXT_ENCODER, name
    for prefix, network in _PREFIXES:
        if name.startswith(prefix):
            inner = name.removeprefix(prefix).removeprefix(_WRAPPER)
            if network != DENOISER and _T5_MODULE.match(inner):
                raise _t5_error(module)
            return network, inner
    return DENOISER, name


def _t5_error(module: str) -> FileError:
    return FileError(
        f"has weights for a T5 text encoder ({module}), which this server does not apply: retrain "
        "it without T5."
    )
