"""LoRA files to the rows of a pipeline's banks: one reading serves all networks."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np

from closeup.errors import RequestError
from closeup.lora import Factors, Floats, Lora, pack_factors
from closeup.lora_files import FileError, StoredTensor, StoredTensors, read_safetensors
from closeup.lora_keys import DENOISER, ModuleKeys, group_keys
from closeup.lora_names import LayerNames, Target
from closeup.lora_scales import Scales
from closeup.manifest import LoraLayout, ModelManifest

# A pipeline's networks (``denoiser``, ``text_encoder``, ``text_encoder_2``) and the layouts of
# their banks; None for a network without LoRA inputs.
Layouts = Mapping[str, LoraLayout | None]


def layouts_from_manifest(manifest: ModelManifest) -> dict[str, LoraLayout | None]:
    """Return the layouts of a pipeline's networks, the denoiser's first."""
    return {
        DENOISER: manifest.lora,
        **{encoder.name: encoder.lora for encoder in manifest.encoders},
    }


def read_lora(path: Path, layouts: Layouts, *, name: str | None = None) -> Lora:
    """Read a LoRA file for the pipeline that ``layouts`` belong to.

    Scale per layer: the file's ``alpha`` over its rank; without one, what the header's
    ``lora_adapter_metadata`` (diffusers, PEFT) says; without that, 1.

    Args:
        path: a safetensors file in PEFT, diffusers, kohya or original FLUX.1 style, F32, F16,
            BF16 or F64.
        layouts: of the pipeline's banks, by network. What a file has for a network whose layout
            is None is ignored with a warning.
        name: what messages call it; the file's name when None.

    Returns:
        The rows of each network that the file adapts, as wide as its largest rank there but at
        most ``max_rank``; a wider file is approximated, with a warning that states the relative
        error.

    Raises:
        RequestError: the file is damaged, no plain LoRA, holds values that are not finite, was
            made for another model, or has nothing for a network with LoRA inputs; the sentence
            names the first offending layer.
    """
    name = path.stem if name is None else name
    try:
        return _lora_from_stored(name, read_safetensors(path), layouts)
    except FileError as error:
        raise RequestError({"prompt": f"the LoRA {name!r} {error}"}) from error


def _lora_from_stored(name: str, stored: StoredTensors, layouts: Layouts) -> Lora:
    reader = _Reader(stored, layouts)
    for keys in group_keys(stored.tensors):
        reader.read(keys)
    if not reader.factors:
        raise FileError(
            f"adapts only {' and '.join(reader.ignored)}, which this model was exported for "
            "without LoRA inputs."
        )
    warnings = tuple(
        f"LoRA {name!r}: its {count} layers for {network} are ignored, since that network was "
        "exported without LoRA inputs."
        for network, count in reader.ignored.items()
    )
    networks = {}
    for network in sorted(reader.factors):
        layout, factors = reader.factors[network]
        label = name if network == DENOISER else f"{name} ({network})"
        networks[network] = pack_factors(label, factors, layout, layout.max_rank)
    return Lora(name=name, networks=networks, warnings=warnings)


class _Reader:
    """Reads a file's modules one by one.

    Attributes:
        factors: network -> its layout, and factors by place there.
        ignored: network -> modules left out for want of LoRA inputs.
    """

    def __init__(self, stored: StoredTensors, layouts: Layouts) -> None:
        self.factors: dict[str, tuple[LoraLayout, dict[int, Factors]]] = {}
        self.ignored: Counter[str] = Counter()
        self._stored = stored
        self._layouts = layouts
        self._names: dict[str, LayerNames] = {}
        self._scales: dict[str, Scales] = {}

    def read(self, keys: ModuleKeys) -> None:
        """Read one module.

        Raises:
            FileError: see `read_lora`.
        """
        tensors = self._stored.tensors[str(keys.down)], self._stored.tensors[str(keys.up)]
        _check_pointwise(keys.module, *tensors)
        if keys.network not in self._layouts:
            raise FileError(
                f"was made for another model: its layer {keys.module} belongs to a "
                f"{keys.network}, which this model does not have."
            )
        layout = self._layouts[keys.network]
        if layout is None:
            self.ignored[keys.network] += 1
            return
        target = self._target(keys, layout, tensors)
        if keys.network not in self.factors:
            self.factors[keys.network] = layout, {}
        factors = self.factors[keys.network][1]
        for place, item in self._parts(keys, layout, target, tensors):
            if place in factors:
                raise FileError(f"adapts the layer {layout.layers[place].name} twice.")
            factors[place] = item

    def _target(
        self, keys: ModuleKeys, layout: LoraLayout, tensors: tuple[StoredTensor, StoredTensor]
    ) -> Target:
        if keys.network not in self._names:
            self._names[keys.network] = LayerNames(layout.layers)
            self._scales[keys.network] = Scales.from_metadata(self._stored.metadata, keys.network)
        target = self._names[keys.network].find(keys.inner)
        given = tensors[0].shape[1], tensors[1].shape[0]
        if target is None:
            raise FileError(
                f"was made for another model: its layer {keys.module} ({given[0]} to {given[1]} "
                f"features) is not one of those that this model's {keys.network} adapts."
            )
        layers = [layout.layers[place] for place in target.places]
        expected = layers[0].in_features, sum(layer.out_features for layer in layers)
        if given != expected:
            layer_name = layers[0].name if len(layers) == 1 else keys.module
            raise FileError(
                f"was made for another model: its layer {layer_name} maps {given[0]} to "
                f"{given[1]} features, this model's maps {expected[0]} to {expected[1]}."
            )
        return target

    def _parts(
        self,
        keys: ModuleKeys,
        layout: LoraLayout,
        target: Target,
        tensors: tuple[StoredTensor, StoredTensor],
    ) -> Iterator[tuple[int, Factors]]:
        """The module's factors, divided among the layers of the bank that it stands for."""
        layers = [layout.layers[place] for place in target.places]
        alpha = None if keys.alpha is None else self._alpha(keys)
        rank = tensors[0].shape[0]
        if alpha is None:
            scale = self._scales[keys.network].scale(layers[0].name, rank)
        else:
            scale = alpha / rank
        whole = _factors_from_tensors(keys.module, tensors, scale, swaps=target.swaps_halves)
        if len(layers) == 1:
            yield target.places[0], whole
            return
        first = 0
        for place, layer in zip(target.places, layers, strict=True):
            up = whole.up[first : first + layer.out_features]
            first += layer.out_features
            # Files made by joining three LoRAs have zeros off their diagonal: less to store.
            used = up.any(0)
            if used.any():
                yield place, Factors(down=whole.down[:, used], up=up[:, used])

    def _alpha(self, keys: ModuleKeys) -> float:
        values = self._stored.tensors[str(keys.alpha)].floats().reshape(-1)
        if len(values) != 1 or not np.isfinite(values[0]):
            raise FileError(f"is damaged: the alpha of {keys.module} is not one finite number.")
        return float(values[0])


def _check_pointwise(module: str, down: StoredTensor, up: StoredTensor) -> None:
    for tensor in (down, up):
        if len(tensor.shape) == 4 and tensor.shape[2:] != (1, 1):
            height, width = tensor.shape[2:]
            raise FileError(
                f"adapts the {height}x{width} convolution {module} (LoCon), which this server "
                "does not apply: retrain it without convolution layers."
            )
        if len(tensor.shape) not in (2, 4):
            raise FileError(f"is damaged: {module} has a factor of shape {tensor.shape}.")
    if down.shape[0] != up.shape[1] or down.shape[0] == 0:
        raise FileError(
            f"is damaged: the factors of {module} have ranks {down.shape[0]} and {up.shape[1]}."
        )


def _factors_from_tensors(
    module: str, tensors: tuple[StoredTensor, StoredTensor], scale: float, *, swaps: bool
) -> Factors:
    down: Floats = tensors[0].floats()
    up: Floats = tensors[1].floats()
    down, up = down.reshape(down.shape[:2]).T, up.reshape(up.shape[:2])
    if not (np.isfinite(down).all() and np.isfinite(up).all()):
        raise FileError(f"is damaged: the layer {module} holds values that are not finite.")
    if swaps:
        up = np.roll(up, len(up) // 2, axis=0)
    with np.errstate(over="ignore"):  # an overflow shows in the picture of this LoRA alone
        return Factors(down=down, up=up * np.float32(scale))
