"""How LoRA files name their tensors: PEFT, diffusers (new and old) and kohya styles.

A key is a module and a part (down, up, alpha). Modules come dotted, as diffusers spells them, or
with every dot turned into an underscore (kohya), and the blocks may be counted as in the original
Stable Diffusion code. All are looked up in one table made from the layout, so nothing is guessed
back from underscores.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from closeup.lora_files import FileError
from closeup.manifest import LoraLayer

_DOWN_UP: Mapping[str, str] = {"A": "down", "B": "up", "down": "down", "up": "up"}
_ENDINGS = (
    re.compile(r"(.+)\.lora_(A|B)(?:\.[\w-]+)?\.weight"),  # PEFT, with or without adapter name
    re.compile(r"(.+)\.lora_(down|up)\.weight"),  # kohya
    re.compile(r"(.+)\.lora(?:_linear_layer)?\.(down|up)\.weight"),  # diffusers
    re.compile(r"(.+)_lora\.(down|up)\.weight"),  # diffusers' old attention processors
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

_WRAPPERS = ("base_model.model.",)
_DENOISERS = ("unet.", "transformer.", "model.diffusion_model.", "diffusion_model.", "lora_unet_",
              "lora_transformer_")  # fmt: skip
_TEXT_ENCODERS = re.compile(
    r"(?:text_encoder(?:_\d)?|text_model|text_encoders|conditioner|cond_stage_model)\.|lora_te\d?_"
)


@dataclass(kw_only=True, slots=True)
class ModuleKeys:
    """The tensors of one adapted module.

    Attributes:
        module: as the file spells it.
        down: name of A, (r, in) or (r, in, 1, 1).
        up: name of B, (out, r) or (out, r, 1, 1).
        alpha: name of the scalar, None when there is none.
    """

    module: str
    down: str | None = None
    up: str | None = None
    alpha: str | None = None


@dataclass(kw_only=True, slots=True)
class GroupedKeys:
    """The keys of a file.

    Attributes:
        denoiser: modules of the denoiser, in the file's order.
        text_encoders: modules of text encoders.
    """

    denoiser: list[ModuleKeys] = field(default_factory=list)
    text_encoders: list[ModuleKeys] = field(default_factory=list)


def group_keys(names: Iterable[str]) -> GroupedKeys:
    """Sort a file's tensor names by module.

    Raises:
        FileError: a name that is no LoRA's, belongs to a method that cannot be applied, or a
            module without one of its two factors.
    """
    names = list(names)
    _refuse_other_methods(names)
    modules: dict[str, ModuleKeys] = {}
    for name in names:
        module, part = _split_key(name)
        keys = modules.setdefault(module, ModuleKeys(module=module))
        if getattr(keys, part) is not None:
            raise FileError(f"has two {part} tensors for the layer {module}.")
        setattr(keys, part, name)
    grouped = GroupedKeys()
    for keys in modules.values():
        if keys.down is None or keys.up is None:
            lacking = "down (A)" if keys.down is None else "up (B)"
            raise FileError(f"is incomplete: the layer {keys.module} has no {lacking} tensor.")
        is_text = _TEXT_ENCODERS.match(_unwrapped(keys.module))
        (grouped.text_encoders if is_text else grouped.denoiser).append(keys)
    if not modules:
        raise FileError("holds no tensors.")
    return grouped


def _refuse_other_methods(names: Iterable[str]) -> None:
    for name in names:
        for pattern, method in _REFUSED:
            if pattern.search(name):
                raise FileError(
                    f"has {method} weights ({name}), which this server does not apply: only plain "
                    "LoRA on linear layers and 1x1 convolutions is served."
                )


class LayerNames:
    """Finds a layer of the bank by any of the spellings a file may use for it.

    Args:
        layers: of the layout, named as in diffusers.
    """

    def __init__(self, layers: Sequence[LoraLayer]) -> None:
        self._places: dict[str, int] = {}
        names = [layer.name for layer in layers]
        per_block = _layers_per_block(names)
        for aliases in (
            names,
            [name.removesuffix(".0") if name.endswith(".to_out.0") else name for name in names],
            [original_name(name, per_block) for name in names],
        ):
            for place, alias in enumerate(aliases):
                self._places.setdefault(alias, place)
                self._places.setdefault(alias.replace(".", "_"), place)

    def find(self, module: str) -> int | None:
        """Return the place in the layout of a file's module, None when it is not there."""
        name = _unwrapped(module)
        for prefix in ("", *_DENOISERS):
            if name.startswith(prefix):
                place = self._places.get(name.removeprefix(prefix).replace(".processor", ""))
                if place is not None:
                    return place
        return None


def original_name(name: str, layers_per_block: int) -> str:
    """Return how the original Stable Diffusion code calls a UNet module of diffusers.

    Args:
        name: such as ``down_blocks.1.attentions.0.proj_in``.
        layers_per_block: residual blocks of a down block.

    Returns:
        Such as ``input_blocks.4.1.proj_in``; the name itself when it has no such form.
    """
    for ours, theirs in _ORIGINAL_LEAVES.items():
        name = name.replace(ours, theirs)
    match = re.fullmatch(r"(down|up)_blocks\.(\d+)\.(resnets|attentions)\.(\d+)\.(.+)", name)
    if match:
        index = int(match[2]) * (layers_per_block + 1) + int(match[4])
        block = f"input_blocks.{index + 1}" if match[1] == "down" else f"output_blocks.{index}"
        return f"{block}.{int(match[3] == 'attentions')}.{match[5]}"
    match = re.fullmatch(r"mid_block\.(resnets|attentions)\.(\d+)\.(.+)", name)
    if match:
        index = 2 * int(match[2]) + int(match[1] == "attentions")
        return f"middle_block.{index}.{match[3]}"
    return name


_ORIGINAL_LEAVES: Mapping[str, str] = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "time_emb_proj": "emb_layers.1",
    "conv_shortcut": "skip_connection",
}


def _layers_per_block(names: Iterable[str]) -> int:
    found = (re.match(r"down_blocks\.\d+\.(?:resnets|attentions)\.(\d+)\.", name) for name in names)
    return 1 + max((int(match[1]) for match in found if match), default=1)


def _split_key(name: str) -> tuple[str, str]:
    if name.endswith(_ALPHA):
        return name.removesuffix(_ALPHA), "alpha"
    for ending in _ENDINGS:
        match = ending.fullmatch(name)
        if match:
            return match[1], _DOWN_UP[match[2]]
    raise FileError(f"has a tensor {name[:120]!r} that is not part of a LoRA this server knows.")


def _unwrapped(module: str) -> str:
    for wrapper in _WRAPPERS:
        module = module.removeprefix(wrapper)
    return module
