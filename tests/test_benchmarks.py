"""The benchmarks' arithmetic and tables."""

from __future__ import annotations

import datetime
import gc
import json
import mmap
import os
import time
from pathlib import Path

import numpy as np
import pytest

from benchmarks.hardware import describe_machine, machine_kind, memory_bytes, processor_name
from benchmarks.lora_tables import (
    BASELINE,
    NO_LORA,
    Sample,
    mix_section,
    step_section,
    turns,
    wait_section,
)
from benchmarks.measuring import compare_pairs, median_by_name, psnr_db
from benchmarks.overhead import Load, OverheadSample, overhead_section
from benchmarks.processes import (
    MemoryWatch,
    cpu_seconds,
    cpu_seconds_by_name,
    descendants,
    machine_cpu_seconds,
    parents_of_all,
    pss_bytes,
)
from benchmarks.random_loras import random_tensors, write_random_lora
from benchmarks.results import (
    Section,
    Verdict,
    markdown_table,
    report_data,
    report_json,
    report_markdown,
    section_markdown,
)
from benchmarks.serving import Counters, counters_from
from closeup.lora_read import read_lora
from closeup.manifest import LoraLayer, LoraLayout

SECTION = Section(
    title="A thing",
    columns=("stage", "ms"),
    rows=(("encode", "4"), ("generate", "590")),
    verdicts=(Verdict(name="ratio", value=0.95, limit=0.9),),
    notes=("Medians.",),
)
METRICS = """# HELP closeup_engine_seconds_total Seconds in the denoiser engine
# TYPE closeup_engine_seconds_total counter
closeup_engine_seconds_total{model="demo_denoiser"} 1.5
closeup_engine_calls_total{model="demo_denoiser"} 20
closeup_sequence_steps_total{model="demo_denoiser"} 60
nv_inference_count{model="upscaler",version="1"} 3
"""


def _statistics(upscaler_ns: int) -> dict[str, object]:
    runs = [
        {"batch_size": 1, "compute_infer": {"count": 2, "ns": upscaler_ns}},
        {"batch_size": 4, "compute_infer": {"count": 1, "ns": 10**9}},
    ]
    return {
        "model_stats": [
            {"name": "upscaler", "batch_stats": runs},
            {"name": "demo_denoiser", "batch_stats": runs},
            {"name": "generate", "batch_stats": runs},
        ]
    }


def test_comparison_takes_ratios_of_neighbours_when_the_load_drifts() -> None:
    # Both sides slow down threefold half way: the ratio of medians would be 0.5 or 1.5.
    comparison = compare_pairs([1.0, 1.0, 3.0, 3.0], [2.0, 2.0, 6.0, 6.0])
    assert comparison.ratio == 0.5
    assert comparison.spread == (0.5, 0.5)
    assert (comparison.ours, comparison.theirs) == (2.0, 4.0)


def test_comparison_refuses_when_the_sides_differ_in_number() -> None:
    with pytest.raises(ValueError, match="1 and 2 samples"):
        compare_pairs([1.0], [1.0, 2.0])


def test_median_by_name_takes_each_name_alone_when_samples_are_mixed() -> None:
    samples = [{"a": 1.0, "b": 9.0}, {"a": 3.0, "b": 7.0}, {"a": 2.0, "b": 8.0}]
    assert median_by_name(samples) == {"a": 2.0, "b": 8.0}


def test_psnr_is_worked_by_hand_when_every_pixel_differs_by_one() -> None:
    one = np.full((4, 4, 3), 100, np.uint8)
    error_of_one = 20 * np.log10(255)
    assert psnr_db(one, np.full_like(one, 101)) == pytest.approx(error_of_one)
    assert psnr_db(one, one) == float("inf")
    assert psnr_db(one, np.zeros_like(one)) < 10  # a black picture is no agreement


def test_psnr_refuses_when_shapes_differ() -> None:
    with pytest.raises(ValueError, match="one shape"):
        psnr_db(np.zeros((2, 2, 3), np.uint8), np.zeros((2, 1, 3), np.uint8))


@pytest.mark.parametrize(
    ("value", "at_least", "met"),
    [(0.9, False, True), (0.91, False, False), (0.9, True, True), (0.89, True, False)],
)
def test_verdict_is_met_on_the_right_side_when_the_limit_is_near(
    value: float, at_least: bool, met: bool
) -> None:
    verdict = Verdict(name="x", value=value, limit=0.9, at_least=at_least)
    assert verdict.met is met
    assert verdict.describe().startswith("ok" if met else "MISSED")


def test_table_aligns_columns_when_cells_differ_in_length() -> None:
    assert markdown_table(SECTION.columns, SECTION.rows).splitlines() == [
        "| stage    |  ms |",
        "|----------|----:|",
        "| encode   |   4 |",
        "| generate | 590 |",
    ]


def test_table_refuses_when_a_row_is_short() -> None:
    with pytest.raises(ValueError, match="expected 2"):
        markdown_table(("a", "b"), [("1",)])


def test_report_holds_tables_verdicts_and_machine_when_written() -> None:
    day = datetime.date(2026, 1, 2)
    text = report_markdown([SECTION], {"cores": "2"}, "python -m benchmarks", day)
    assert "# Benchmarks, 2026-01-02" in text
    assert "| cores" in text
    assert section_markdown(SECTION) in text
    data = json.loads(report_json(report_data([SECTION], {}, "c", day)))
    assert data["sections"][0]["verdicts"][0]["met"] is False
    assert data["sections"][0]["rows"][1] == ["generate", "590"]


def test_counters_take_batches_once_and_the_denoisers_own_when_both_are_given() -> None:
    counters = counters_from(_statistics(10**9), METRICS)
    assert counters.engine_s == {"upscaler": 2.0, "demo_denoiser": 1.5}
    assert counters.calls == {"upscaler": 3, "demo_denoiser": 20}
    assert counters.sequence_steps == 60


def test_counters_subtract_when_an_earlier_reading_is_given() -> None:
    earlier, later = (counters_from(_statistics(ns), METRICS) for ns in (10**9, 3 * 10**9))
    added = later.since(earlier)
    assert added.engine_s == {"upscaler": 2.0, "demo_denoiser": 0.0}
    assert added.sequence_steps == 0


def test_descendants_are_all_below_when_the_tree_branches() -> None:
    parents = {2: 1, 3: 1, 4: 2, 5: 4, 9: 8}
    assert sorted(descendants(2, parents)) == [2, 4, 5]


def test_own_process_has_memory_and_parents_when_read() -> None:
    assert parents_of_all()[os.getpid()] == os.getppid()
    assert pss_bytes(os.getpid()) > 10 * 2**20  # Python with numpy is larger than that
    assert pss_bytes(2**22 + 1) == 0  # past the largest process id


def test_cpu_seconds_grow_when_the_process_works() -> None:
    before_s = cpu_seconds(os.getpid())
    started_s = time.process_time()
    while time.process_time() - started_s < 0.1:
        pass
    assert cpu_seconds(os.getpid()) - before_s >= 0.05  # the kernel counts in ticks of 10 ms


def test_machine_counts_at_least_what_this_process_uses_when_it_works() -> None:
    before_s, own_s = machine_cpu_seconds(), time.process_time()
    while time.process_time() - own_s < 0.2:
        pass
    assert machine_cpu_seconds() - before_s >= 0.1
    assert sum(cpu_seconds_by_name(os.getpid()).values()) == pytest.approx(
        cpu_seconds(os.getpid()), abs=0.05
    )  # a few ticks pass between the two


def test_overhead_is_the_wall_time_without_any_engine_when_summed_up() -> None:
    def asked(wall_s: float) -> OverheadSample:
        engine_s = {"a": 0.5, "b": 0.3, "idle": 0.0}
        calls = {"a": 4.0, "b": 1.0, "idle": 0.0}
        return OverheadSample(
            wall_s=wall_s, added=Counters(engine_s=engine_s, calls=calls, sequence_steps=4)
        )

    cpu_s = {"generate": 0.3, "tritonserver": 0.3, "a": 2.4}
    load = Load(cpu_s=cpu_s, machine_s=3.0, wall_s=3.2)
    section = overhead_section("toy", [asked(1.0), asked(0.84), asked(1.6)], load, 0.08)
    assert section.verdicts[0].value == pytest.approx(0.2)  # of 0.05, 0.2, 0.5
    assert not section.verdicts[0].met
    assert ("a", "4", "500.0") in section.rows
    assert not [row for row in section.rows if row[0] == "idle"]
    assert ("outside engine calls", "", "200.0") in section.rows
    assert ("CPU time of processes without engines", "", "200.0") in section.rows
    assert ("CPU time of all server processes", "", "1000.0") in section.rows
    assert "20.0% of the server's" in section.notes[0]
    assert "Other programs used 0%" in section.notes[0]
    assert load.others == 0
    cores = len(os.sched_getaffinity(0))
    assert Load(cpu_s=cpu_s, machine_s=3.0 + 1.6, wall_s=3.2).others == pytest.approx(0.5 / cores)


def test_report_has_a_record_a_line_when_written_as_json() -> None:
    faces = [{"seed": 1, "right": {"hair": True}}, {"seed": 2, "right": {}}]
    record = {"results": {'a "b"': {"faces": faces, "pictures": []}}, "margin": 0.1}
    text = report_json(record)
    assert json.loads(text) == record
    assert '    {"seed": 2, "right": {}}' in text.splitlines()
    assert report_json(record, depth=0) == json.dumps(record)


def test_memory_watch_sees_the_peak_when_it_is_over_before_the_end() -> None:
    gc.collect()  # what other tests left must not go while this one looks
    before = pss_bytes(os.getpid())
    with MemoryWatch(pid=os.getpid()) as watch, mmap.mmap(-1, 64 << 20) as block:
        block.write(bytes([1]) * len(block))
        watch.sample()
    assert watch.peak_bytes - before > 50 << 20


def test_machine_facts_are_read_when_the_kernel_gives_them() -> None:
    assert processor_name("processor : 0\nmodel name\t: ACME Z 9\n") == "ACME Z 9"
    assert processor_name("") == "unknown"
    assert memory_bytes("MemTotal:       1024 kB\n") == 1 << 20
    assert machine_kind({"processor": "ACME (R) Z 9", "cores": "2"}) == "acme-r-z-9-2-cores"


def test_machine_is_described_without_its_name_when_results_are_written() -> None:
    facts = " ".join(describe_machine().values())
    assert os.uname().nodename not in facts
    assert "/" not in facts


def test_turns_begin_with_each_name_in_turn_when_there_are_more_rounds_than_names() -> None:
    assert turns(("a", "b", "c"), 4) == [
        ("a", "b", "c"), ("b", "c", "a"), ("c", "a", "b"), ("a", "b", "c"),
    ]  # fmt: skip


def samples(*walls: float) -> list[Sample]:
    """Samples whose CPU time is twice the wall time."""
    return [Sample(wall_s=wall, cpu_s=2 * wall) for wall in walls]


def test_step_table_holds_ratios_to_the_export_without_inputs_when_ranks_cost_time() -> None:
    section = step_section(
        "m",
        {
            BASELINE: samples(0.01, 0.02),
            NO_LORA: [Sample(wall_s=0.011, cpu_s=0.03), Sample(wall_s=0.022, cpu_s=0.06)],
        },
    )
    assert section.rows == (
        (BASELINE, "15.0", "1.00", "1.00 to 1.00", "1.00"),
        (NO_LORA, "16.5", "1.10", "1.10 to 1.10", "1.50"),
    )
    assert "Medians of 2 rounds" in section.notes[0]


def test_wait_table_holds_ratios_to_no_lora_when_files_are_read() -> None:
    section = wait_section(
        "m", 16, {"on disk only": samples(0.3, 0.3, 0.5), NO_LORA: samples(0.1, 0.1, 0.1)}
    )
    assert [row[:3] for row in section.rows] == [
        ("on disk only", "300.0", "3.00"), (NO_LORA, "100.0", "1.00"),
    ]  # fmt: skip
    assert "rank 16" in section.notes[0]


@pytest.mark.parametrize(("different", "met"), [(2.0, True), (2.1, True), (2.2, False)])
def test_mix_misses_its_target_when_different_loras_are_slower(different: float, met: bool) -> None:
    section = mix_section("m", 8, samples(*[different] * 3), samples(2.0, 2.0, 2.0))
    assert section.verdicts[0].value == pytest.approx(2.0 / different)
    assert section.verdicts[0].met is met
    assert section.rows[1][1:] == (f"{different:.2f}", f"{2 * different:.2f}")
    assert f"different / same: {different / 2:.3f}" in section.notes[0]


def test_random_lora_fills_every_layer_when_read_as_the_server_does(tmp_path: Path) -> None:
    layouts = {
        "denoiser": LoraLayout(
            max_rank=8,
            layers=(
                LoraLayer(name="mid_block.attentions.0.proj_in", in_features=6, out_features=5),
                LoraLayer(name="mid_block.attentions.0.proj_out", in_features=5, out_features=6),
            ),
        ),
        "text_encoder": LoraLayout(
            max_rank=8,
            layers=(LoraLayer(name="encoder.layers.0.mlp.fc1", in_features=3, out_features=4),),
        ),
        "text_encoder_2": None,
    }
    path = write_random_lora(tmp_path / "a.safetensors", layouts, rank=4, seed=1)
    lora = read_lora(path, layouts)
    assert lora.warnings == ()
    assert {name: part.rows.shape for name, part in lora.networks.items()} == {
        "denoiser": (22, 4), "text_encoder": (7, 4),
    }  # fmt: skip
    for part in lora.networks.values():
        assert (part.rows != 0).mean() > 0.9  # chance makes few zeros, a layer left out many
    again, other = (random_tensors(layouts, rank=4, seed=seed) for seed in (1, 2))
    name = "text_encoder.encoder.layers.0.mlp.fc1.lora_A.weight"
    assert again[name].shape == (4, 3)
    assert not np.array_equal(again[name], other[name])
