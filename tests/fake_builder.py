"""A TensorRT builder without TensorRT: the attributes that `export.builder` uses, of any version.

It reads the graph's inputs and outputs, keeps what it was told, and "builds" a plan of bytes that
name the graph. What a real builder makes of our graphs is shown by tests/test_engine_builds*.py.
"""

from __future__ import annotations

import enum
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
from onnx import TensorProto


class DataType(enum.Enum):
    """Element types."""

    FLOAT = TensorProto.FLOAT
    HALF = TensorProto.FLOAT16
    BF16 = TensorProto.BFLOAT16
    INT64 = TensorProto.INT64


class BuilderFlag(enum.IntEnum):
    """TF32 is on by default."""

    TF32 = 4


class CreationFlag(enum.IntEnum):
    """As TensorRT 10 has them."""

    EXPLICIT_BATCH = 0
    STRONGLY_TYPED = 1


class Severity(enum.Enum):
    """Of log lines."""

    ERROR = 1


class Tensor:
    """An input or output of a network."""

    def __init__(self, value: onnx.ValueInfoProto) -> None:
        kind = value.type.tensor_type
        self.name = value.name
        self.dtype = DataType(kind.elem_type)
        self.shape = tuple(
            -1 if dim.HasField("dim_param") else dim.dim_value for dim in kind.shape.dim
        )


class Network:
    """What the parser read."""

    def __init__(self, flags: int) -> None:
        self.flags = flags
        self.inputs: list[Tensor] = []
        self.outputs: list[Tensor] = []
        self.graph = ""

    @property
    def num_inputs(self) -> int:
        """Count of inputs."""
        return len(self.inputs)

    @property
    def num_outputs(self) -> int:
        """Count of outputs."""
        return len(self.outputs)

    def get_input(self, index: int) -> Tensor:
        """Return an input."""
        return self.inputs[index]

    def get_output(self, index: int) -> Tensor:
        """Return an output."""
        return self.outputs[index]


class ParserError:
    """Why a graph cannot be read."""

    def desc(self) -> str:
        """Return the reason."""
        return "no importer\nfor Wobble"

    def node_name(self) -> str:
        """Return the node."""
        return "/wobble"


class OnnxParser:
    """Reads a graph's interface; refuses graphs with an operation called Wobble."""

    def __init__(self, network: Network, logger: Any) -> None:
        self.network = network
        self.num_errors = 0

    def parse_from_file(self, path: str) -> bool:
        """Read a file."""
        graph = onnx.load(path, load_external_data=False).graph
        if any(node.op_type == "Wobble" for node in graph.node):
            self.num_errors = 1
            return False
        self.network.inputs = [Tensor(value) for value in graph.input]
        self.network.outputs = [Tensor(value) for value in graph.output]
        self.network.graph = Path(path).name
        return True

    def get_error(self, index: int) -> ParserError:
        """Return an error."""
        return ParserError()


class OptimizationProfile:
    """Keeps shapes by input."""

    def __init__(self) -> None:
        self.shapes: dict[str, tuple[Any, ...]] = {}

    def set_shape(self, name: str, low: Any, opt: Any, high: Any) -> None:
        """Keep an input's shapes."""
        self.shapes[name] = (low, opt, high)


class TimingCache:
    """A set of words, one for each graph that was timed."""

    def __init__(self, data: bytes) -> None:
        self.words = set(data.split())

    def combine(self, other: TimingCache, ignore_mismatch: bool) -> bool:
        """Add another cache's words."""
        self.words |= other.words
        return True

    def serialize(self) -> bytes:
        """Return the words."""
        return b" ".join(sorted(self.words))


class Config:
    """Keeps what it is told."""

    def __init__(self) -> None:
        self.flags = {BuilderFlag.TF32}
        self.profiles: list[OptimizationProfile] = []
        self.progress_monitor: Any = None
        self.timing_cache = TimingCache(b"")

    def clear_flag(self, flag: BuilderFlag) -> None:
        """Switch off."""
        self.flags.discard(flag)

    def add_optimization_profile(self, profile: OptimizationProfile) -> int:
        """Return the profile's index; -1 when an input called ``refused`` is in it."""
        if "refused" in profile.shapes:
            return -1
        self.profiles.append(profile)
        return len(self.profiles) - 1

    def create_timing_cache(self, data: bytes) -> TimingCache | None:
        """Read a cache; None when it is damaged."""
        return None if data.startswith(b"damaged") else TimingCache(data)

    def set_timing_cache(self, cache: TimingCache, ignore_mismatch: bool) -> bool:
        """Use a cache."""
        self.timing_cache = cache
        return True

    def get_timing_cache(self) -> TimingCache:
        """Return what was measured."""
        return self.timing_cache


class Builder:
    """Builds bytes in five steps."""

    def __init__(self, module: FakeTensorrt, logger: Any) -> None:
        self.module = module
        self.logger = logger

    def create_network(self, flags: int) -> Network:
        """Return an empty network."""
        return Network(flags)

    def create_builder_config(self) -> Config:
        """Return a config with the defaults."""
        return Config()

    def create_optimization_profile(self) -> OptimizationProfile:
        """Return an empty profile."""
        return OptimizationProfile()

    def build_serialized_network(self, network: Network, config: Config) -> bytes | None:
        """Build; None when a monitor says stop or the module was told to fail."""
        self.module.built.append((network, config))
        monitor = config.progress_monitor
        if monitor is not None:
            monitor.phase_start("Building", None, 5)
            monitor.phase_start("inner", "Building", 100)
        for step in range(5):
            self.module.while_building()
            if monitor is not None:
                monitor.step_complete("inner", 20 * step)
                if not monitor.step_complete("Building", step):
                    return None
        if self.module.error:
            self.logger.log(Severity.ERROR, self.module.error)
            return None
        config.timing_cache.words.add(self.module.word)
        return f"plan of {network.graph}".encode()


class FakeTensorrt(types.ModuleType):
    """The module.

    Attributes:
        built: networks and configs, in the order of their builds.
        error: a line of the log with which builds fail; empty: they succeed.
        while_building: called at every step.
        word: what a build adds to the timing cache.
    """

    def __init__(self, version: str, *, strongly_typed_flag: bool = True) -> None:
        super().__init__("tensorrt")
        self.__version__ = version
        self.built: list[tuple[Network, Config]] = []
        self.error = ""
        self.word = b"timed"
        self.while_building: Callable[[], None] = lambda: None
        self.DataType = DataType
        self.BuilderFlag = BuilderFlag
        self.NetworkDefinitionCreationFlag = CreationFlag if strongly_typed_flag else object()
        self.OnnxParser = OnnxParser
        self.ILogger = object
        self.IProgressMonitor = object
        self.Runtime = lambda logger: object()  # data-centre TensorRT checks no headers

    def Builder(self, logger: Any) -> Builder:  # noqa: N802 - TensorRT's name
        """Return a builder."""
        return Builder(self, logger)
