"""What the command line asks for, what the pipeline's folder says, and when nothing changed.

Imports nothing heavy, so that an unchanged export is over in a moment.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import closeup
from closeup.errors import ExportError
from export.facts import FOLDER_OPTIONS_NAME, ModelFacts, check_facts
from export.plan_options import PlanOptions, check_plan_options
from export.precisions import (
    COMPONENTS,
    FACE_DETECTOR,
    UPSCALER,
    Precision,
    Target,
    resolve_precision,
)

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_SHARED_NAMES = ("generate", "generate_stream", "upscaler", "face_detector")
# Their versions decide what is written.
_PACKAGES = ("torch", "diffusers", "transformers", "onnx", "onnxruntime", "optimum-onnx")
# Modules of the library that decide it too: tensors of the denoiser's config, the manifest.
_DECIDING = ("families.py", "manifest.py", "segments.py", "tensors.py")


@dataclass(frozen=True, kw_only=True, slots=True)
class ExportOptions:
    """What the user asked for.

    Attributes:
        model: folder or hub id of a diffusers pipeline, or one .safetensors checkpoint in the
            original key layout.
        name: the request field ``model``; prefix of the Triton models.
        repository: where they go.
        lora_rank: the largest rank of the LoRA inputs; 0 leaves them out.
        precision: of the denoiser and the text encoders, and of the upscaler in plans.
        component_precision: by component; wins.
        target: graphs, or graphs and plans.
        plans: how plans are built.
        max_batch: sequences in an engine call.
        max_tokens: length of T5's prompts (FLUX.1).
        config: folder with the configs of a checkpoint that is one file.
        upscaler: weights of the repository's upscaler.
        face_detector: weights or ONNX file of the repository's face detector.
        facts: flags for the manifest; they win over the folder's.
        force: export even when nothing changed.
    """

    model: str
    name: str
    repository: Path
    lora_rank: int = 32
    precision: Precision = Precision.FP32
    component_precision: Mapping[str, Precision] = field(default_factory=dict)
    target: Target = Target.ONNX
    plans: PlanOptions = field(default_factory=PlanOptions)
    max_batch: int = 8
    max_tokens: int = 512
    config: Path | None = None
    upscaler: Path | None = None
    face_detector: Path | None = None
    facts: ModelFacts = field(default_factory=ModelFacts)
    force: bool = False

    def precision_of(self, component: str, *, is_t5: bool = False) -> Precision:
        """Return the precision of a component of `export.precisions.COMPONENTS`.

        Raises:
            ExportError: it cannot have the one that was asked for.
        """
        return resolve_precision(
            component,
            target=self.target,
            precision=self.precision,
            chosen=self.component_precision,
            is_t5=is_t5,
        )


def check_options(options: ExportOptions) -> None:
    """Refuse options that cannot be right.

    Raises:
        ExportError: with one sentence.
    """
    if not _NAME.fullmatch(options.name) or options.name in _SHARED_NAMES:
        raise ExportError(
            f"--name {options.name!r}: expected letters, digits, '.', '_' and '-', and none of "
            f"{', '.join(_SHARED_NAMES)}."
        )
    if not 0 <= options.lora_rank <= 256:
        raise ExportError(f"--lora-rank {options.lora_rank}: expected 0 to 256.")
    if not 1 <= options.max_batch <= 64:
        raise ExportError(f"--max-batch {options.max_batch}: expected 1 to 64.")
    if not 16 <= options.max_tokens <= 512:
        raise ExportError(f"--max-tokens {options.max_tokens}: expected 16 to 512.")
    check_facts(options.facts, flags=options.facts)
    check_plan_options(options.plans, has_plans=options.target is not Target.ONNX)
    _check_files(options)
    _check_precisions(options)


def _check_precisions(options: ExportOptions) -> None:
    for component in COMPONENTS:
        options.precision_of(component)
    for component, given in ((UPSCALER, options.upscaler), (FACE_DETECTOR, options.face_detector)):
        if component in options.component_precision and given is None:
            flag = component.replace("_", "-")
            raise ExportError(f"--component-precision {component}: needs --{flag} FILE.")


def _check_files(options: ExportOptions) -> None:
    if options.config is not None and not is_single_file(options.model):
        raise ExportError("--config goes with a --model that is one .safetensors file.")
    if options.config is not None and not (options.config / "model_index.json").is_file():
        raise ExportError(f"--config {options.config}: there is no model_index.json.")
    for flag, path in (("upscaler", options.upscaler), ("face-detector", options.face_detector)):
        if path is not None and not path.is_file():
            raise ExportError(f"--{flag} {path}: there is no such file.")


def is_single_file(model: str) -> bool:
    """Whether ``--model`` names a checkpoint that is one file."""
    return model.endswith(".safetensors") and Path(model).is_file()


def resolve_folder(model: str) -> Path:
    """Return the folder of a pipeline, downloading it when ``model`` is a hub id.

    Raises:
        ExportError: neither a pipeline folder nor an id that can be had.
    """
    folder = Path(model)
    if folder.is_dir():
        if not (folder / "model_index.json").is_file():
            raise ExportError(
                f"{model} has no model_index.json: expected the folder of a diffusers pipeline."
            )
        return folder
    if folder.suffix.lower() == ".safetensors" and not folder.exists():
        raise ExportError(f"--model {model}: there is no such file.")
    if folder.exists():
        raise ExportError(
            f"--model {model} is a file that is not read: expected a .safetensors file or a "
            "pipeline's folder."
        )
    if not _HUB_ID.fullmatch(model) or model.startswith((".", "/")):
        raise ExportError(f"there is no folder {model}, and it is no hub id like owner/name.")
    from diffusers import DiffusionPipeline

    try:
        return Path(DiffusionPipeline.download(model, use_safetensors=True))
    except Exception as error:
        reason = str(error).strip().splitlines()
        raise ExportError(
            f"{model} is no folder here and cannot be had from the hub as safetensors: "
            f"{reason[0] if reason else type(error).__name__}"
        ) from error


def pipeline_fingerprint(options: ExportOptions, folder: Path | None, facts: ModelFacts) -> str:
    """Hash everything that decides what the pipeline's export writes.

    Args:
        options: of the export.
        folder: of the pipeline, or of the configs of a single file, if given.
        facts: for the manifest.
    """
    used: dict[str, Any] = {
        "name": options.name,
        "lora_rank": options.lora_rank,
        "precision": options.precision,
        "component_precision": dict(options.component_precision),
        "planned": options.target is not Target.ONNX,
        "max_batch": options.max_batch,
        "max_tokens": options.max_tokens,
        "facts": asdict(facts),
    }
    if is_single_file(options.model):
        used["single_file"] = hash_file(Path(options.model))
    if folder is None:
        return _fingerprint(used, Path(), ())
    files = [path for path in sorted(folder.rglob("*")) if _matters(path.relative_to(folder))]
    return _fingerprint(used, folder, files)


def upscaler_fingerprint(options: ExportOptions, path: Path) -> str:
    """Hash everything that decides what the upscaler's export writes."""
    return file_fingerprint(options, path, precision=options.precision_of(UPSCALER))


def file_fingerprint(options: ExportOptions, path: Path, **used: Any) -> str:
    """Hash everything that decides what exporting one weights file writes."""
    planned = options.target is not Target.ONNX
    return _fingerprint({**used, "planned": planned}, path.parent, [path])


def hash_file(path: Path) -> str:
    """SHA-256 of a file, in hex."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


def _fingerprint(used: Mapping[str, Any], folder: Path, files: Iterable[Path]) -> str:
    digest = hashlib.sha256(json.dumps(used, sort_keys=True).encode())
    for package in _PACKAGES:
        digest.update(f"{package} {_version(package)}\n".encode())
    library = Path(closeup.__file__).parent
    for source in (*sorted(Path(__file__).parent.glob("*.py")), *map(library.joinpath, _DECIDING)):
        digest.update(source.read_bytes())
    for path in files:
        digest.update(f"{path.relative_to(folder)} {path.stat().st_size}\n".encode())
        digest.update(hash_file(path).encode())
    return digest.hexdigest()


def _version(package: str) -> str:
    """An installed package's version; its build for GPUs goes by a name of its own."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return importlib.metadata.version(f"{package}-gpu")


def _matters(path: Path) -> bool:
    """Whether a file of a pipeline's folder is read by the export."""
    if path.parts[0] not in (
        "model_index.json", FOLDER_OPTIONS_NAME,
        "unet", "transformer", "vae", "scheduler",
        "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2",
    ):  # fmt: skip
        return False
    return path.suffix in (".json", ".txt", ".safetensors")
