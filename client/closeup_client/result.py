"""What comes back: progress events, and the result with its pictures and report."""

from __future__ import annotations

import base64
import binascii
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from closeup_client.errors import ServerFailure
from closeup_client.pictures import suffix_from_bytes

if TYPE_CHECKING:
    from PIL import Image

Outputs: TypeAlias = Mapping[str, Sequence[bytes]]


@dataclass(frozen=True, kw_only=True, slots=True)
class Progress:
    """Where a running request is.

    Attributes:
        stage: such as ``"generate"``, ``"super_resolution"``, ``"faces"``.
        step: steps done in this stage.
        steps: steps of this stage.
        image: which picture, None when it concerns all.
        eta_s: the server's estimate of what is left of this stage, seconds; None when unknown.
        elapsed_s: since the request started, seconds.
        preview: a small JPEG, with ``previews=True``.
    """

    stage: str
    step: int
    steps: int
    image: int | None = None
    eta_s: float | None = None
    elapsed_s: float = 0.0
    preview: bytes | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class StageImage:
    """A picture after one stage, with ``stages=True``.

    Attributes:
        image: index of the picture.
        stage: ``"generated"``, ``"super_resolution"`` or ``"hires_fix"``.
        data: bytes of an image file.
    """

    image: int
    stage: str
    data: bytes


@dataclass(frozen=True, kw_only=True, slots=True)
class Result:
    """The pictures of one request and the server's report.

    Attributes:
        images: bytes of image files, in the order of their seeds.
        info: the server's report: seeds, sizes, milliseconds a stage, faces, usage, warnings.
        stages: the pictures after each stage, in order; empty without ``stages=True``.
        face_pass: whether the request asked for `inpaint_faces`.
    """

    images: list[bytes]
    info: dict[str, Any]
    stages: list[StageImage]
    face_pass: bool = False

    @property
    def seeds(self) -> list[int]:
        """The seed of each picture."""
        return list(self.info.get("seeds", ()))

    @property
    def warnings(self) -> list[str]:
        """What the server did otherwise than asked, such as a prompt that was cut."""
        return list(self.info.get("warnings", ()))

    def faces(self, image: int = 0) -> list[dict[str, Any]]:
        """The report of each face of one picture."""
        images = self.info.get("images", ())
        return list(images[image].get("faces") or ()) if image < len(images) else []

    def before_faces(self, image: int = 0) -> bytes | None:
        """One picture as it was before the face pass; None without stages or without that pass."""
        own = [stage for stage in self.stages if stage.image == image]
        return own[-1].data if own and self.face_pass else None

    def pil(self) -> list[Image.Image]:
        """The pictures as PIL images; needs Pillow (``pip install closeup-client[sheet]``)."""
        from PIL import Image

        return [Image.open(io.BytesIO(data)) for data in self.images]

    def save(self, folder: str | Path) -> list[Path]:
        """Write everything into a folder, made when missing; files of the same names are replaced.

        ``picture.png``, the stages as ``generated.png``, ``super_resolution.png``, ... with the
        last one before the face pass as ``before_faces.png``, and ``info.json``. With several
        pictures each name ends in its index: ``picture_0.png``. The endings follow the format.

        Returns:
            The files written, pictures first.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        files: dict[str, bytes] = {}
        for index, data in enumerate(self.images):
            files[self._name("picture", index, data)] = data
        last = {stage.image: position for position, stage in enumerate(self.stages)}
        for position, stage in enumerate(self.stages):
            is_last = self.face_pass and last[stage.image] == position
            name = "before_faces" if is_last else stage.stage
            files[self._name(name, stage.image, stage.data)] = stage.data
        files["info.json"] = f"{json.dumps(self.info, indent=2)}\n".encode()
        for name, data in files.items():
            (folder / name).write_bytes(data)
        return [folder / name for name in files]

    def _name(self, stem: str, index: int, data: bytes) -> str:
        place = f"_{index}" if len(self.images) > 1 else ""
        return f"{stem}{place}{suffix_from_bytes(data)}"


def result_from_outputs(outputs: Outputs, *, encoding: str, face_pass: bool) -> Result:
    """The result from the output tensors.

    Args:
        outputs: ``image``, ``info`` and, with stages, ``stage_image``; elements as bytes.
        encoding: ``"raw"`` or ``"base64"``, of the pictures.
        face_pass: whether the request asked for it.

    Raises:
        ServerFailure: the tensors are not those of a closeup server.
    """
    if "image" not in outputs or not outputs.get("info"):
        raise ServerFailure(
            f"the answer holds {', '.join(sorted(outputs)) or 'nothing'}; expected image and info."
        )
    info = _object(outputs["info"][0], "info")
    pictures = [_decoded(data, encoding) for data in outputs.get("stage_image", ())]
    labels = info.get("stage_images") or []
    if len(labels) != len(pictures):
        raise ServerFailure(
            f"the answer holds {len(pictures)} stage pictures and names {len(labels)} of them."
        )
    stages = [
        StageImage(image=int(label["image"]), stage=str(label["stage"]), data=data)
        for label, data in zip(labels, pictures, strict=True)
    ]
    images = [_decoded(data, encoding) for data in outputs["image"]]
    return Result(images=images, info=info, stages=stages, face_pass=face_pass)


def event_from_outputs(
    outputs: Outputs, *, encoding: str, face_pass: bool
) -> Progress | Result | None:
    """One event of a stream; None for kinds of events this version does not know.

    Raises:
        ServerFailure: the tensors are not those of a closeup server.
    """
    if not outputs:
        return None  # Triton's empty final response
    event: dict[str, Any] = {"type": "result"}
    if outputs.get("event"):
        event = _object(outputs["event"][0], "event")
    if event.get("type") == "result":
        return result_from_outputs(outputs, encoding=encoding, face_pass=face_pass)
    if event.get("type") != "progress":
        return None
    previews = outputs.get("preview")
    return Progress(
        stage=str(event.get("stage", "")),
        step=int(event.get("step", 0)),
        steps=int(event.get("steps", 0)),
        image=event.get("image"),
        eta_s=event.get("eta_s"),
        elapsed_s=float(event.get("elapsed_s") or 0.0),
        preview=_decoded(previews[0], encoding) if previews and previews[0] else None,
    )


def _decoded(data: bytes, encoding: str) -> bytes:
    if encoding == "raw":
        return bytes(data)
    try:
        return base64.b64decode(data, validate=True)
    except binascii.Error:
        raise ServerFailure("a picture in the answer is not base64.") from None


def _object(text: bytes, name: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise ServerFailure(f"`{name}` in the answer is not a JSON object.")
    return value
