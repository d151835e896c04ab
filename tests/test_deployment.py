"""The Dockerfiles and the compose file, as far as they can be checked without Docker."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement

from closeup.server_options import check_options
from closeup.server_options import parse_arguments as parse_server
from export.__main__ import parse_options as parse_export
from tests.paths import ROOT

DOCKERFILES = (ROOT / "Dockerfile", ROOT / "deploy" / "cpu.Dockerfile")
COMPOSE = ROOT / "docker-compose.yml"
SERVERS = ("triton", "triton-cpu")
ONE_SHOTS = ("export", "export-cpu", "smoke", "smoke-cpu")
SCRIPTS = ("serve.sh", "export.sh")


def run_tool(name: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    tool = Path(sys.executable).parent / name
    if not tool.exists():
        pytest.skip(f"{name} is not installed")
    return subprocess.run([tool, *arguments], capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def services() -> dict[str, dict[str, Any]]:
    loaded: dict[str, dict[str, Any]] = yaml.safe_load(COMPOSE.read_text())["services"]
    return loaded


def interpolate(text: str) -> str:
    """Put the defaults in place of variables, as compose does."""
    return re.sub(r"\$\{\w+:-([^}]*)\}", r"\1", text)


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.name)
def test_dockerfile_passes_hadolint(path: Path) -> None:
    done = run_tool("hadolint", "--failure-threshold", "info", str(path))
    assert done.returncode == 0, done.stdout


def test_compose_file_is_valid_and_a_wrong_one_is_not(tmp_path: Path) -> None:
    def check(path: Path) -> int:
        return run_tool(
            "check-jsonschema", "--builtin-schema", "vendor.compose-spec", str(path)
        ).returncode

    assert check(COMPOSE) == 0
    wrong = tmp_path / "docker-compose.yml"
    wrong.write_text(COMPOSE.read_text().replace("shm_size:", "shm_sizes:"))
    assert check(wrong) == 1


def test_image_of_nvidia_is_named_in_one_place_and_pinned() -> None:
    listed = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    if listed.returncode:
        pytest.skip("not a git checkout")
    registry = "nvcr" + ".io"
    naming = [
        name for name in listed.stdout.split()
        if (ROOT / name).is_file() and registry.encode() in (ROOT / name).read_bytes()
    ]  # fmt: skip
    assert naming == ["Dockerfile"]
    for path in DOCKERFILES:
        images = re.findall(r"^ARG \w+_IMAGE=(\S+)$", path.read_text(), re.MULTILINE)
        assert len(images) == 1
        assert re.search(r":\d[\w.-]+$", images[0])  # a version, not latest
        assert re.findall(r"^FROM (\S+)", path.read_text(), re.MULTILINE)[1:] == ["serve"]


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.name)
def test_everything_copied_exists_and_is_in_the_build_context(path: Path) -> None:
    allowed = {
        line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line[:1] == "!"
    }
    sources = [
        source
        for line in re.findall(r"^COPY (.+)$", path.read_text(), re.MULTILINE)
        for source in line.split()[:-1]
    ]
    assert len(sources) > 8
    for source in sources:
        assert (ROOT / source).exists(), source
        assert source.split("/")[0] in allowed, source


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.name)
def test_every_stage_ends_as_an_unprivileged_user(path: Path) -> None:
    stages = re.split(r"^FROM ", path.read_text(), flags=re.MULTILINE)[1:]
    assert len(stages) == 2
    for stage in stages:
        assert re.findall(r"^USER (\S+)", stage, re.MULTILINE)[-1] == "1000:1000"


@pytest.mark.parametrize("name", SERVERS)
def test_server_is_confined_and_watched(services: dict[str, dict[str, Any]], name: str) -> None:
    service = services[name]
    assert service["user"] == "1000:1000"
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    # The embedded server executes what it copies to /tmp; without the word tmpfs is noexec.
    (temporary,) = service["tmpfs"]
    path, _, options = temporary.partition(":")
    assert path == "/tmp"
    assert {"exec", "mode=1777"} <= set(options.split(","))
    assert all(interpolate(volume).endswith(":ro") for volume in service["volumes"])
    assert service["restart"] == "unless-stopped"
    assert service["shm_size"] == "2gb"
    assert service["healthcheck"]["test"][0] == "CMD"
    compile(service["healthcheck"]["test"][-1], "healthcheck", "exec")
    (needed,) = service["depends_on"].values()
    assert needed == {"condition": "service_completed_successfully"}


@pytest.mark.parametrize(
    ("refused", "code"), [("", 0), ("/v2/models/demo_denoiser/ready", 1), ("/v2/health/ready", 1)]
)
def test_health_check_fails_when_the_server_or_a_denoiser_is_not_ready(
    services: dict[str, dict[str, Any]], refused: str, code: int
) -> None:
    asked = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:  # noqa: N802
            asked.append(self.path)
            self.send_response(400 if self.path == refused else 200)
            self.end_headers()

        def do_POST(self) -> None:  # noqa: N802
            index = [{"name": "generate"}, {"name": "demo_denoiser"}]
            self.send_response(200)
            self.end_headers()
            self.wfile.write(json.dumps(index).encode())

        def log_message(self, *arguments: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    text = services["triton"]["healthcheck"]["test"][-1]
    done = subprocess.run(
        [sys.executable, "-c", text.replace(":8000/", f":{server.server_port}/")],
        env={"http_proxy": "http://127.0.0.1:9"}, capture_output=True, check=False,
    )  # fmt: skip
    server.shutdown()
    server.server_close()
    assert done.returncode == code
    expected = ["/v2/health/ready", "/v2/models/demo_denoiser/ready"]
    assert asked == (expected[:1] if refused == expected[0] else expected)


@pytest.mark.parametrize("name", ONE_SHOTS)
def test_one_shot_services_do_not_restart(services: dict[str, dict[str, Any]], name: str) -> None:
    assert services[name]["restart"] == "no"
    assert services[name]["user"] == "1000:1000"


def test_profiles_part_the_services_and_the_gpu_is_the_default(
    services: dict[str, dict[str, Any]],
) -> None:
    assert set(services) == {*SERVERS, *ONE_SHOTS}
    for name, service in services.items():
        assert service["profiles"] == ["cpu" if name.endswith("-cpu") else "gpu"]
        has_gpu = "deploy" in service
        assert has_gpu == (name in ("export", "triton"))
    assert "COMPOSE_PROFILES=gpu" in (ROOT / ".env").read_text().splitlines()


@pytest.mark.parametrize(("name", "target"), [("export", "tensorrt"), ("export-cpu", "onnx")])
def test_export_command_is_one_that_the_export_takes(
    services: dict[str, dict[str, Any]], name: str, target: str
) -> None:
    arguments = shlex.split(interpolate(services[name]["command"]))
    options = parse_export(arguments)
    assert (options.name, str(options.target)) == ("demo", target)
    weights = [Path(options.model), options.upscaler, options.face_detector]
    for path in weights:
        assert path is not None
        assert (ROOT / "demo" / "weights" / path.relative_to("/srv/weights")).exists()


@pytest.mark.parametrize("name", ["smoke", "smoke-cpu"])
def test_smoke_request_is_one_that_the_client_takes(
    services: dict[str, dict[str, Any]], name: str
) -> None:
    from closeup_client.cli import build_parser

    given = build_parser().parse_args(shlex.split(services[name]["command"]))
    assert given.url == "triton:8001"
    reachable = services["triton-cpu"]["networks"]["default"]["aliases"]
    assert reachable == ["triton"]  # the name that the GPU's server has by itself


def test_entry_point_of_the_slim_image_is_one_that_the_server_takes(tmp_path: Path) -> None:
    text = DOCKERFILES[1].read_text().replace("\\\n", " ")
    entry = re.findall(r"^ENTRYPOINT (\[.+\])$", text, re.MULTILINE)[0]
    arguments = yaml.safe_load(entry)
    assert arguments[:3] == ["python3", "-m", "closeup.server"]
    options = parse_server(arguments[3:])
    assert (str(options.repository), options.host) == ("/srv/closeup/models", "0.0.0.0")
    assert callable(check_options)


@pytest.mark.parametrize(
    ("library", "code", "told"),
    [(None, 0, ""), ("11.1.0.106", 0, ""), ("11.2.1.2", 1, "TensorRT 11.2.1.2")],
)
def test_build_of_the_image_stops_when_tensorrt_is_of_another_version_and_only_then(
    tmp_path: Path, library: str | None, code: int, told: str
) -> None:
    """The check in the Dockerfile, as it stands there, beside a package ``tensorrt`` 11.1."""
    found = re.findall(r'^ +&& python3 -c "(.+)"$', DOCKERFILES[0].read_text(), re.MULTILINE)
    assert len(found) == 1
    assert "version_problem" in found[0]
    (tmp_path / "tensorrt.py").write_text('__version__ = "11.1.0.106"\n')
    # The library that the image would have is put in place of this machine's.
    text = f"from closeup import nvinfer; nvinfer.library_version = lambda: {library!r}; {found[0]}"
    done = subprocess.run(
        [sys.executable, "-c", text],
        env={"PYTHONPATH": f"{tmp_path}:{ROOT}"}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == code, done.stderr
    assert told in done.stderr
    assert bool(done.stderr) == bool(told)


@pytest.mark.parametrize("published", ["10.14.1.48", "10.14.1.48.post1"])
def test_image_takes_the_package_of_its_tensorrt_when_it_was_published_again(
    published: str,
) -> None:
    wanted = re.findall(r'"(tensorrt-cu13[\w-]*==\$version\S*)"', DOCKERFILES[0].read_text())
    assert len(wanted) == 2
    for text in wanted:
        requirement = Requirement(text.replace("$version", "10.14.1.48"))
        assert requirement.specifier.contains(published)
        assert not requirement.specifier.contains("10.14.1.49")


def test_stages_of_nvidias_image_keep_its_entry_point_and_name_scripts_that_exist() -> None:
    text = DOCKERFILES[0].read_text()
    entries = [json.loads(one) for one in re.findall(r"^ENTRYPOINT (.+)$", text, re.MULTILINE)]
    assert [entry[0] for entry in entries] == ["/opt/nvidia/nvidia_entrypoint.sh"] * 2
    assert "test -x /opt/nvidia/nvidia_entrypoint.sh" in text  # the build stops where it is not
    scripts = [Path(entry[1]) for entry in entries]
    assert [path.name for path in scripts] == list(SCRIPTS)
    for path in scripts:
        assert (ROOT / path.relative_to("/opt/closeup")).is_file()


@pytest.mark.parametrize("name", SCRIPTS)
def test_script_is_executable_and_parses(name: str) -> None:
    path = ROOT / "deploy" / name
    assert path.stat().st_mode & 0o111
    assert subprocess.run(["bash", "-n", path], check=False).returncode == 0


def run_script(
    name: str, tmp_path: Path, *arguments: str, environment: Mapping[str, str] | None = None
) -> tuple[subprocess.CompletedProcess[str], list[str]]:
    """Run a script with programs that note how they were called."""
    programs = tmp_path / "bin"
    programs.mkdir()
    for program in ("python3", "tritonserver"):
        (programs / program).write_text(f'#!/bin/sh\necho "{program} $*" >> "{tmp_path}/calls"\n')
        (programs / program).chmod(0o755)
    text = (ROOT / "deploy" / name).read_text().replace("/opt/closeup/", f"{ROOT}/")
    script = tmp_path / name
    script.write_text(text)
    variables = {
        "PATH": f"{programs}:/usr/bin:/bin",
        "CLOSEUP_REPOSITORY": str(tmp_path / "models"),
        **(environment or {}),
    }
    done = subprocess.run(
        ["bash", script, *arguments], env=variables, capture_output=True, text=True, check=False
    )
    return done, (tmp_path / "calls").read_text().splitlines()


def test_export_script_lays_out_the_python_models_and_may_run_again(tmp_path: Path) -> None:
    done, calls = run_script("export.sh", tmp_path, "--name", "demo")
    assert done.returncode == 0, done.stderr
    assert calls == [f"python3 -m export --repository {tmp_path}/models --name demo"]
    for model in ("generate", "generate_stream"):
        assert (tmp_path / "models" / model / "config.pbtxt").is_file()
        assert (tmp_path / "models" / model / "1" / "model.py").is_file()


@pytest.mark.parametrize(
    ("given", "expected"), [({}, 30), ({"CLOSEUP_EXIT_TIMEOUT_S": "600"}, 600)]
)
def test_both_servers_give_running_requests_the_time_that_the_environment_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given: dict[str, str], expected: int
) -> None:
    monkeypatch.delenv("CLOSEUP_EXIT_TIMEOUT_S", raising=False)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    _, calls = run_script("serve.sh", tmp_path, environment=given)
    assert f"--exit-timeout-secs={expected} " in calls[1]
    assert parse_server([]).exit_timeout_s == expected


def test_grace_period_is_longer_than_any_request(services: dict[str, dict[str, Any]]) -> None:
    for name in SERVERS:
        limit_s = interpolate(services[name]["environment"]["CLOSEUP_REQUEST_TIMEOUT_S"])
        assert int(services[name]["stop_grace_period"].removesuffix("s")) > int(limit_s)


def test_serve_script_drains_the_server_before_it_ends_it(tmp_path: Path) -> None:
    programs = tmp_path / "bin"
    programs.mkdir()
    calls = tmp_path / "calls"
    (programs / "python3").write_text(f'#!/bin/sh\necho "python3 $*" >> "{calls}"\n')
    (programs / "tritonserver").write_text(
        f"""#!/bin/bash
trap 'echo "tritonserver ends" >> "{calls}"; exit 0' TERM
echo "tritonserver drains by $CLOSEUP_DRAIN_FILE" >> "{calls}"
while :; do sleep 0.02; done
"""
    )
    for program in programs.iterdir():
        program.chmod(0o755)
    variables = {"PATH": f"{programs}:/usr/bin:/bin", "CLOSEUP_EXIT_TIMEOUT_S": "7",
                 "CLOSEUP_DRAIN_FILE": str(tmp_path / "draining")}  # fmt: skip
    (tmp_path / "draining").touch()  # of a server before
    server = subprocess.Popen(["bash", ROOT / "deploy" / "serve.sh"], env=variables)
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline and "drains" not in (
        calls.read_text() if calls.exists() else ""
    ):
        time.sleep(0.02)
    assert not (tmp_path / "draining").exists()
    server.terminate()
    assert server.wait(20) == 0
    assert calls.read_text().splitlines()[1:] == [
        f"tritonserver drains by {tmp_path}/draining",
        f"python3 -m closeup.drain --file {tmp_path}/draining --limit-s 7",
        "tritonserver ends",
    ]


def test_serve_script_checks_before_it_serves_and_stops_when_the_check_fails(
    tmp_path: Path,
) -> None:
    done, calls = run_script("serve.sh", tmp_path, "--log-verbose=1")
    assert done.returncode == 0, done.stderr
    assert calls[0] == f"python3 -m closeup.preflight --repository {tmp_path}/models"
    assert calls[1].startswith(f"tritonserver --model-repository={tmp_path}/models ")
    assert calls[1].endswith("--log-verbose=1")
    (tmp_path / "bin" / "python3").write_text("#!/bin/sh\nexit 1\n")
    (tmp_path / "calls").unlink()
    script = tmp_path / "serve.sh"
    environment = {"PATH": f"{tmp_path}/bin:/usr/bin:/bin"}
    assert subprocess.run(["bash", script], env=environment, check=False).returncode == 1
    assert not (tmp_path / "calls").exists()
