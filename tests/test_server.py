"""The embedded server: start, stop, failures, and late answers from Python models."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import tritonclient.grpc as grpcclient
from tritonclient.utils import InferenceServerException

from closeup.errors import ServerError
from closeup.server import EmbeddedServer, ServerOptions, error_from_log, main
from closeup.server_layout import check_platform, find_installation
from closeup.server_log import cut_tail, find_reason
from closeup.server_options import (
    ModelControl,
    check_options,
    choose_ports,
    make_command,
    parse_arguments,
)
from closeup.server_regions import clear_dead_regions, create_region, region_exists
from tests.triton_fixtures import make_input, make_mode, make_repository, post_json, save_double

ROOT = Path(__file__).resolve().parents[1]


def free_ports(repository: Path, **changes: Any) -> ServerOptions:
    return ServerOptions(
        repository=repository,
        http_port=0,
        grpc_port=0,
        metrics_port=0,
        exit_timeout_s=5,
        **changes,
    )


def wait_until(condition: Callable[[], bool], timeout_s: float = 20) -> bool:
    deadline = time.monotonic() + timeout_s
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.05)
    return condition()


def list_traces(pid: int) -> list[str]:
    """Files of servers that process ``pid`` started."""
    folders = (Path("/dev/shm"), Path(tempfile.gettempdir()))
    return [str(path) for folder in folders for path in folder.glob(f"closeup_{pid}_*")]


def list_descendants(pid: int) -> list[Any]:
    return list(psutil.Process(pid).children(recursive=True))


def is_gone(process: Any) -> bool:
    try:
        return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_repository(tmp_path_factory.mktemp("server"))


@pytest.fixture(scope="module")
def small_repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One model without a config."""
    folder = tmp_path_factory.mktemp("small")
    save_double(folder / "double" / "1" / "model.onnx")
    return folder


@pytest.fixture(scope="module")
def server(repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[EmbeddedServer]:
    lora_dir = tmp_path_factory.mktemp("loras")
    options = free_ports(repository, slots=3, threads=1, request_timeout_s=12.5, lora_dir=lora_dir)
    with EmbeddedServer(options) as started:
        yield started


@pytest.fixture(scope="module")
def client(server: EmbeddedServer) -> Any:
    return grpcclient.InferenceServerClient(server.grpc_url)


def ask_late(client: Any, *inputs: Any, **arguments: Any) -> Any:
    answer = client.infer("late", list(inputs), **arguments)
    return json.loads(answer.as_numpy("info")[0])


@pytest.mark.triton
def test_server_answers_on_all_ports_when_started(server: EmbeddedServer, client: Any) -> None:
    assert client.is_server_ready()
    status, answer = post_json(f"http://{server.http_url}/v2/models/late/generate", {"mode": "x"})
    assert status == 400  # mode x without an x
    assert answer["error"].startswith("UNAVAILABLE: ")
    assert b"nv_inference" in urlopen(server.metrics_url)
    assert server.log_path.is_file()


def urlopen(url: str) -> bytes:
    with urllib.request.urlopen(url, timeout=10) as answer:
        return bytes(answer.read())


@pytest.mark.triton
def test_server_hands_its_options_to_models_when_given(server: EmbeddedServer, client: Any) -> None:
    environment = ask_late(client, make_mode("tell"))["environment"]
    assert environment["CLOSEUP_SLOTS"] == "3"
    assert environment["CLOSEUP_THREADS"] == "1"
    assert environment["CLOSEUP_REQUEST_TIMEOUT_S"] == "12.5"
    assert Path(environment["CLOSEUP_LORA_DIR"]) == server.options.lora_dir


@pytest.mark.triton
def test_late_model_calls_an_onnx_model_when_asked_through_bls(client: Any) -> None:
    x = np.arange(6, dtype=np.float32).reshape(2, 3)
    assert ask_late(client, make_mode("x"), make_input("x", x)) == (2 * x).tolist()


@pytest.mark.triton
def test_late_model_sees_parameters_and_absent_inputs_when_called_by_http(
    server: EmbeddedServer,
) -> None:
    url = f"http://{server.http_url}/v2/models/late/generate"
    status, answer = post_json(url, {"colour": "red", "n": 3, "half": 0.5})
    assert status == 200
    info = json.loads(answer["info"])
    assert info["inputs"] == []
    assert info["parameters"] == {"colour": "red", "n": 3, "half": 0.5}


@pytest.mark.triton
def test_late_model_keeps_eight_requests_in_flight_when_they_come_together(client: Any) -> None:
    threads = [
        threading.Thread(target=ask_late, args=(client, make_mode("sleep"))) for _ in range(8)
    ]
    started = time.monotonic()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    # Each sleeps 0.5 s: one after the other they would take 4 s.
    assert 0.5 <= time.monotonic() - started < 2


@pytest.mark.triton
def test_late_model_answers_with_the_code_when_it_fails(client: Any) -> None:
    with pytest.raises(InferenceServerException) as caught:
        ask_late(client, make_mode("fail"))
    assert caught.value.status() == "StatusCode.UNAVAILABLE"
    assert caught.value.message() == "UNAVAILABLE: told to fail"


@pytest.mark.triton
def test_late_model_sees_the_cancel_when_the_client_cancels_or_times_out(client: Any) -> None:
    call = client.async_infer(
        "late", [make_mode("wait")], callback=lambda result, error: None, request_id="cancel"
    )
    time.sleep(0.3)
    call.cancel()
    with pytest.raises(InferenceServerException):
        ask_late(client, make_mode("wait"), request_id="deadline", client_timeout=0.3)
    wait_until(lambda: len(ask_late(client)["cancelled_after_s"]) == 2, timeout_s=5)
    seen = ask_late(client)["cancelled_after_s"]
    # Cancelled at 0.3 s; never reported would be the 5 s that the model waits.
    assert set(seen) == {"cancel", "deadline"}
    assert all(0.2 < after_s < 2 for after_s in seen.values())


@pytest.mark.triton
def test_server_leaves_nothing_when_stopped(small_repository: Path, tmp_path: Path) -> None:
    before = set(list_traces(os.getpid()))
    server = EmbeddedServer(free_ports(small_repository, log_path=tmp_path / "log.txt"))
    server.start()
    assert server.pid is not None
    processes = [psutil.Process(server.pid), *list_descendants(server.pid)]
    assert len(processes) >= 3  # guard, tritonserver, one stub
    assert len(set(list_traces(os.getpid())) - before) >= 3  # lock, folder, memory
    server.stop()
    assert all(is_gone(process) for process in processes)
    assert set(list_traces(os.getpid())) == before
    assert "Started HTTPService" in (tmp_path / "log.txt").read_text()


def test_start_tries_other_ports_when_a_chosen_one_was_lost(
    small_repository: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = "E1122 12:00:00.1 7 http.cc:1] \"Socket '127.0.0.1:8000' already in use\"\n"
    tries: list[int] = []

    def start_once(self: EmbeddedServer, installation: object) -> None:
        tries.append(len(tries))
        if len(tries) < succeeds_at:
            raise error_from_log(log)

    monkeypatch.setattr(EmbeddedServer, "_start_once", start_once)
    succeeds_at = 2
    EmbeddedServer(free_ports(small_repository)).start()
    assert len(tries) == 2
    tries.clear()
    succeeds_at = 99
    with pytest.raises(ServerError, match="already in use"):
        EmbeddedServer(free_ports(small_repository)).start()
    assert len(tries) == 3


def start_command_line(repository: Path) -> tuple[subprocess.Popen[str], str]:
    command = [sys.executable, "-m", "closeup.server", "--repository", str(repository)]
    command += ["--http-port", "0", "--grpc-port", "0", "--metrics-port", "0"]
    process = subprocess.Popen(
        [*command, "--exit-timeout-s", "5"],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    assert process.stdout is not None
    return process, process.stdout.readline()


@pytest.mark.triton
def test_command_line_prints_urls_and_ends_cleanly_when_told_twice(
    small_repository: Path,
) -> None:
    process, line = start_command_line(small_repository)
    assert line.startswith("ready: HTTP http://127.0.0.1:")
    processes = list_descendants(process.pid)
    process.terminate()
    time.sleep(0.2)
    process.send_signal(signal.SIGINT)  # an impatient second one
    assert process.wait(timeout=30) == 0
    assert all(is_gone(child) for child in processes)
    assert list_traces(process.pid) == []


@pytest.mark.triton
def test_server_ends_and_clears_when_its_program_is_killed(small_repository: Path) -> None:
    process, _ = start_command_line(small_repository)
    processes = list_descendants(process.pid)
    assert len(processes) >= 3
    process.kill()
    process.wait()
    assert wait_until(lambda: all(is_gone(child) for child in processes))
    assert wait_until(lambda: list_traces(process.pid) == [], timeout_s=5)


@pytest.mark.triton
def test_next_start_clears_when_all_processes_were_killed(
    small_repository: Path, server: EmbeddedServer
) -> None:
    living = list_traces(os.getpid())
    process, _ = start_command_line(small_repository)
    processes = list_descendants(process.pid)
    # The guard first, so that it cannot clear; the kernel then kills some of the others for us.
    for member in [*processes, psutil.Process(process.pid)]:
        with contextlib.suppress(psutil.NoSuchProcess):
            member.kill()
    process.wait()
    assert wait_until(lambda: all(is_gone(member) for member in processes))

    def is_cleared() -> bool:
        clear_dead_regions()  # what every start does first
        return list_traces(process.pid) == []

    # A killed process of many threads is a zombie a moment before its last thread, and the lock
    # with it, has gone.
    assert wait_until(is_cleared, timeout_s=5)
    assert list_traces(os.getpid()) == living


@pytest.mark.triton
def test_stop_clears_when_the_guard_was_killed(small_repository: Path) -> None:
    server = EmbeddedServer(free_ports(small_repository))
    before = set(list_traces(os.getpid()))
    server.start()
    assert server.pid is not None
    processes = list_descendants(server.pid)
    os.kill(server.pid, signal.SIGKILL)
    server.stop()
    assert wait_until(lambda: all(is_gone(process) for process in processes))
    assert set(list_traces(os.getpid())) == before


@pytest.mark.triton
def test_start_tells_the_models_own_sentence_when_it_cannot_load(tmp_path: Path) -> None:
    broken = tmp_path / "broken" / "1" / "model.onnx"
    broken.parent.mkdir(parents=True)
    broken.write_bytes(b"not a graph")
    before = list_traces(os.getpid())
    with pytest.raises(ServerError) as caught:
        EmbeddedServer(free_ports(tmp_path)).start()
    first = str(caught.value).splitlines()[0]
    assert first.startswith(
        f"The server did not start: model broken: ONNX Runtime cannot open {broken}"
    )
    assert list_traces(os.getpid()) == before


def test_start_names_every_taken_port_when_ports_are_taken(tmp_path: Path) -> None:
    save_double(tmp_path / "double" / "1" / "model.onnx")
    with (
        socket.create_server(("127.0.0.1", 0)) as http,
        socket.create_server(("127.0.0.1", 0)) as metrics,
    ):
        ports = http.getsockname()[1], metrics.getsockname()[1]
        options = ServerOptions(
            repository=tmp_path, http_port=ports[0], grpc_port=0, metrics_port=ports[1]
        )
        with pytest.raises(ServerError) as caught:
            EmbeddedServer(options).start()
    text = str(caught.value)
    assert f"--http-port {ports[0]} (address already in use)" in text
    assert f"--metrics-port {ports[1]} (address already in use)" in text
    assert "--grpc-port" not in text


def test_choose_ports_gives_three_different_ones_when_all_are_zero(tmp_path: Path) -> None:
    chosen = choose_ports(free_ports(tmp_path))
    ports = {chosen.http_port, chosen.grpc_port, chosen.metrics_port}
    assert len(ports) == 3
    assert 0 not in ports


def test_start_raises_one_sentence_when_options_are_wrong(tmp_path: Path) -> None:
    filled = tmp_path / "filled"
    save_double(filled / "double" / "1" / "model.onnx")
    for options, text in (
        (ServerOptions(repository=tmp_path / "absent"), "There is no model repository at"),
        (ServerOptions(repository=tmp_path / "filled" / "double" / "1"), "holds no model"),
        (ServerOptions(repository=filled, lora_dir=tmp_path / "no"), "no folder of LoRAs"),
        (ServerOptions(repository=filled, threads=0), "--threads is 0; expected"),
        (ServerOptions(repository=filled, slots=-1), "--slots is -1; expected"),
        (ServerOptions(repository=filled, http_port=70000), "--http-port is 70000; expected 0 to"),
        (ServerOptions(repository=filled, grpc_port=-1), "--grpc-port is -1; expected 0 to 65535"),
        (free_ports(filled, host="nowhere.invalid"), "--host 'nowhere.invalid' is no IPv4"),
        (free_ports(filled, host="::1"), "--host '::1' is no IPv4 address"),
        (free_ports(filled, host="192.0.2.1"), "of this machine .cannot assign"),
        (free_ports(filled, host="a..b"), "--host 'a..b' is no IPv4"),
        (free_ports(filled, host=""), "--host '' is no IPv4 address of this machine .it is empty"),
        (free_ports(filled, log_path=tmp_path), "--log-path .* cannot be written .is a directory"),
        (free_ports(filled, log_path=Path("/proc/x/y")), "--log-path /proc/x/y cannot be written"),
    ):
        with pytest.raises(ServerError, match=text) as caught:
            EmbeddedServer(options).start()
        assert "\n" not in str(caught.value)


def test_check_options_accepts_both_sides_when_ports_have_limits(tmp_path: Path) -> None:
    save_double(tmp_path / "double" / "1" / "model.onnx")
    log_path = tmp_path / "new" / "log.txt"
    check_options(
        ServerOptions(
            repository=tmp_path,
            host="localhost",
            http_port=0,
            metrics_port=65535,
            log_path=log_path,
        )
    )
    log_path.write_text("of the last run")
    check_options(free_ports(tmp_path, log_path=log_path, host="0.0.0.0"))
    assert log_path.read_text() == "of the last run"  # a start that is refused keeps it


@pytest.mark.parametrize("function", ["_spawn_guard", "lay_out_backends"])
def test_start_leaves_nothing_when_the_system_refuses(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, function: str
) -> None:
    def refuse(*arguments: object) -> None:
        raise OSError(28, "No space left on device", "/tmp/x")

    save_double(tmp_path / "double" / "1" / "model.onnx")
    monkeypatch.setattr(f"closeup.server.{function}", refuse)
    monkeypatch.setattr("closeup.server.check_platform", lambda: None)
    monkeypatch.setattr("closeup.server.find_installation", lambda: None)
    before, descriptors = list_traces(os.getpid()), len(os.listdir("/proc/self/fd"))
    server = EmbeddedServer(free_ports(tmp_path))
    with pytest.raises(ServerError, match="did not start: .*No space left on device: '/tmp/x'"):
        server.start()
    assert server.pid is None
    assert list_traces(os.getpid()) == before
    assert len(os.listdir("/proc/self/fd")) == descriptors


def test_start_leaves_nothing_when_the_log_cannot_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_double(tmp_path / "double" / "1" / "model.onnx")
    monkeypatch.setattr("closeup.server.check_platform", lambda: None)
    monkeypatch.setattr("closeup.server.find_installation", lambda: None)
    monkeypatch.setattr("closeup.server.check_options", lambda options: None)
    before, descriptors = list_traces(os.getpid()), len(os.listdir("/proc/self/fd"))
    with pytest.raises(ServerError, match="did not start: .*Is a directory"):
        EmbeddedServer(free_ports(tmp_path, log_path=tmp_path)).start()
    assert list_traces(os.getpid()) == before
    assert len(os.listdir("/proc/self/fd")) == descriptors


class StubbornServer(EmbeddedServer):
    """Starts nothing, is told to stop while it waits, and again while it stops."""

    stopped = 0

    def start(self) -> None:
        self.log_path = Path(os.devnull)

    def wait(self) -> int:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(5)
        return 0

    def stop(self) -> None:
        for number in (signal.SIGTERM, signal.SIGINT):
            os.kill(os.getpid(), number)
            time.sleep(0.05)
        StubbornServer.stopped += 1


def test_command_line_stops_in_order_when_it_is_asked_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    kept = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    monkeypatch.setattr("closeup.server.EmbeddedServer", StubbornServer)
    StubbornServer.stopped = 0
    try:
        status = main(["--repository", str(tmp_path), "--exit-timeout-s", "7"])
    except KeyboardInterrupt:
        status = 130
    finally:
        for number, handler in kept.items():
            signal.signal(number, handler)
    assert (status, StubbornServer.stopped) == (0, 1)
    assert capsys.readouterr().err == "Stopping; running requests have 7 s to finish.\n"


@pytest.mark.parametrize(
    ("found", "text"),
    [
        ({"system": "Darwin", "machine": "arm64"}, "runs on Linux x86_64, not Darwin arm64"),
        ({"machine": "aarch64"}, "not Linux aarch64"),
        ({"glibc": "2.31"}, "needs glibc 2.35 or newer, not 2.31"),
        ({"glibc": ""}, "not another C library"),
        ({"python": (3, 10)}, "needs Python 3.11 or 3.12, not 3.10"),
        ({"python": (3, 13)}, "needs Python 3.11 or 3.12, not 3.13"),
        ({"numpy": "2.1.0"}, "numpy 2.1.0 is installed"),
    ],
)
def test_check_platform_says_what_to_use_instead_when_it_cannot_run(
    found: dict[str, Any], text: str
) -> None:
    base: dict[str, Any] = {"system": "Linux", "machine": "x86_64", "glibc": "2.35"}
    base |= {"python": (3, 12), "numpy": "1.26.4"}
    check_platform(**base)
    with pytest.raises(ServerError, match=text) as caught:
        check_platform(**(base | found))
    assert "\n" not in str(caught.value)


def test_find_installation_names_the_extra_when_the_wheel_is_missing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ServerError, match=r"pip install 'closeup\[embedded\]'"):
        find_installation()


def test_find_installation_tells_how_to_get_libpython_when_there_is_none(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("sysconfig.get_config_var", lambda name: None)
    monkeypatch.setattr(
        "subprocess.run", lambda command, **options: subprocess.CompletedProcess(command, 1)
    )
    with pytest.raises(ServerError, match=r"needs libpython3\.\d+\.so\.1\.0, which neither"):
        find_installation()


def test_make_command_carries_every_option_when_given(tmp_path: Path) -> None:
    options = parse_arguments(
        ["--repository", str(tmp_path), "--http-port", "1", "--grpc-port", "2"]
        + ["--metrics-port", "3", "--model-control", "explicit", "--log-verbose", "1"]
    )
    assert options.model_control is ModelControl.EXPLICIT
    command = make_command(options, Path("/bin/t"), Path("/backends"), "closeup_1_0a")
    for argument in (
        f"--model-repository={tmp_path}",
        "--backend-directory=/backends",
        "--http-port=1",
        "--grpc-port=2",
        "--metrics-port=3",
        "--model-control-mode=explicit",
        "--log-verbose=1",
        "--backend-config=python,shm-region-prefix-name=closeup_1_0a_",
    ):
        assert argument in command


def test_clear_dead_regions_spares_a_region_when_its_locks_are_held() -> None:
    region = create_region()
    memory = Path("/dev/shm") / f"{region.name}_memory"
    memory.touch()
    assert region.name not in clear_dead_regions()
    assert memory.exists()
    # This process, whose id is in the name, lives on: only the locks count.
    region.close()
    clear_dead_regions()
    assert not region_exists(region.name)


def test_clear_dead_regions_leaves_other_files_when_names_are_alike() -> None:
    alike = Path("/dev/shm") / f"closeup_notours_{os.getpid()}"
    alike.touch()
    try:
        clear_dead_regions()
        assert alike.exists()
    finally:
        alike.unlink()


def test_create_region_holds_locks_when_made() -> None:
    region = create_region()
    with (Path("/dev/shm") / f"{region.name}.lock").open() as lock, pytest.raises(BlockingIOError):
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    region.close()
    clear_dead_regions()


@pytest.mark.parametrize(
    ("log", "reason"),
    [
        (
            "I1 x\nE1122 12:00:00.1 7 model_lifecycle.cc:642] \"failed to load 'm' version 1: "
            'Internal: TritonModelException: No \\"w\\" here.\\n\\nAt:\\n  model.py(3): f\\n"\n'
            "error: creating server: Internal - failed to load all models\n",
            'model m: No "w" here.',
        ),
        (
            'E1122 12:00:00.1 7 server.cc:241] "CudaDriverHelper has not been initialized."\n'
            'E1122 12:00:00.1 7 main.cc:1] "something else"\n',
            "something else",
        ),
        (
            "E1122 12:00:00.1 7 http.cc:1] \"failed: Socket '127.0.0.1:8000' already in use\"\n",
            "Socket '127.0.0.1:8000' already in use.",
        ),
        ("error: creating server: Internal - no\n", "Internal - no"),
        ("tritonserver: cannot open libx.so\n", "tritonserver: cannot open libx.so"),
        ("", "it ended without a word."),
    ],
)
def test_find_reason_picks_the_telling_line_when_a_start_failed(log: str, reason: str) -> None:
    assert find_reason(log) == reason


def test_cut_tail_drops_tables_when_a_log_has_them() -> None:
    log = "one\n+---+\n| a |\n+---+\n\ntwo\nthree\n"
    assert cut_tail(log, 2) == "two\nthree"
    assert cut_tail(log) == "one\ntwo\nthree"
