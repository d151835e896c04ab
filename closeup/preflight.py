"""`python -m closeup.preflight`: can this machine open the plans of a repository?

Run before ``tritonserver`` in the container: Triton's native backend opens a plan without reading
its record, and answers one for another GPU or version with a null pointer and a page of log.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from closeup.devices import find_gpu
from closeup.errors import ModelError
from closeup.nvinfer import library_version, version_problem
from closeup.plans import Flavour, RuntimeFacts, find_plans, read_record, verify_plan
from closeup.tensorrt_package import import_tensorrt

Facts = Callable[[Flavour], RuntimeFacts]


def runtime_facts(flavour: Flavour) -> RuntimeFacts:
    """Find the TensorRT and the GPU that would open a plan.

    Raises:
        ModelError: plans of TensorRT-RTX, no package, no GPU, or a package of another version than
            Triton's library.
    """
    if flavour is Flavour.RTX:
        raise ModelError(
            "NVIDIA's tritonserver cannot serve plans of TensorRT-RTX, its tensorrt backend has "
            "the other TensorRT: export again with --target tensorrt, or serve them with the "
            "embedded server, python -m closeup.server."
        )
    version = str(import_tensorrt(flavour).__version__)
    problem = version_problem(library_version(), version)
    if problem:
        raise ModelError(problem)
    gpu = find_gpu()
    if gpu is None:
        raise ModelError(
            "there is no NVIDIA GPU that this process may use: start the container with --gpus "
            "all (docker compose: the NVIDIA container toolkit must be installed)."
        )
    return RuntimeFacts(flavour=flavour, version=version, sm=gpu.sm)


def find_problems(repository: Path, facts: Facts = runtime_facts) -> list[str]:
    """Check every plan of a repository.

    Args:
        repository: folder of models.
        facts: what would open a plan of a flavour.

    Returns:
        A sentence for each problem; empty when everything can be opened, or there are no plans.
    """
    problems: list[str] = []
    known: dict[Flavour, RuntimeFacts | None] = {}
    for plan in find_plans(repository):
        try:
            flavour = read_record(plan).flavour
            if flavour not in known:
                known[flavour] = None
                known[flavour] = facts(flavour)
            runtime = known[flavour]
            if runtime is not None:  # else its reason is given already
                verify_plan(plan, runtime)
        except ModelError as error:
            problems.append(str(error))
    return problems


def main(arguments: Sequence[str] | None = None, facts: Facts = runtime_facts) -> int:
    """Run the check; 0 when all is well, 1 with a line for each problem."""
    parser = argparse.ArgumentParser(
        prog="python -m closeup.preflight", description="Check the plans of a model repository."
    )
    parser.add_argument("--repository", type=Path, default=Path("model_repository"))
    given = parser.parse_args(arguments)
    if not given.repository.is_dir():
        sys.stderr.write(f"preflight: there is no model repository at {given.repository}.\n")
        return 1
    problems = find_problems(given.repository, facts)
    for problem in problems:
        sys.stderr.write(f"preflight: {problem}\n")
    if problems:
        return 1
    sys.stdout.write(f"preflight: {len(find_plans(given.repository))} plans can be opened here\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
