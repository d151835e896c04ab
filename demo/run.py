"""`make run`: export the demo model, serve it, paint one picture, stop.

Leaves in ``out/`` the picture, the picture before the face pass, a before/after sheet with the
faces enlarged, and ``info.json``.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from pathlib import Path

from closeup.errors import CloseupError
from closeup.server import EmbeddedServer, ServerOptions
from demo.default_request import DEFAULT_REQUEST

ROOT = Path(__file__).resolve().parent.parent
REPOSITORY = ROOT / "model_repository"
WEIGHTS = ROOT / "demo" / "weights"


def export_demo(repository: Path = REPOSITORY) -> None:
    """Write the demo model into a repository; quick when nothing has changed.

    Raises:
        SystemExit: the export failed and said why.
    """
    done = subprocess.run(export_command(repository), cwd=ROOT, check=False)
    if done.returncode:
        raise SystemExit(done.returncode)


def export_command(repository: Path, *, target: str = "onnx") -> list[str]:
    """Return the export's command line for the demo model; ``target`` is the export's."""
    return [
        sys.executable, "-m", "export",
        "--model", str(WEIGHTS / "sd"), "--name", "demo", "--target", target,
        "--repository", str(repository),
        "--upscaler", str(WEIGHTS / "upscaler.safetensors"),
        "--face-detector", str(WEIGHTS / "face_detector.safetensors"),
    ]  # fmt: skip


def client_command(url: str, out: Path) -> list[str]:
    """Return the client's command line for the default request."""
    command = [str(Path(sys.executable).parent / "closeup-client"), "generate"]
    fields = dict(DEFAULT_REQUEST)
    command.append(str(fields.pop("prompt")))
    for name, value in fields.items():
        flag = f"--{name.replace('_', '-')}"
        command += [flag] if value is True else [flag, str(value)]
    return [*command, "--sheet", "--url", url, "--out", str(out)]


def main() -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=ROOT / "out", help="folder for the pictures")
    parser.add_argument("--export-only", action="store_true", help="do not serve")
    options = parser.parse_args()
    export_demo()
    return 0 if options.export_only else paint(options.out)


def paint(out: Path) -> int:
    """Serve the demo model, send the default request, stop; return the exit code."""
    started_s = time.perf_counter()
    out.mkdir(parents=True, exist_ok=True)
    options = ServerOptions(
        repository=REPOSITORY,
        lora_dir=WEIGHTS / "loras",
        http_port=0,
        grpc_port=0,
        metrics_port=0,
        log_path=out / "server.log",
    )
    try:
        with EmbeddedServer(options) as server:
            print(f"Triton is ready after {time.perf_counter() - started_s:.1f} s")
            return subprocess.run(client_command(server.grpc_url, out), check=False).returncode
    except CloseupError as error:
        print(error, file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
