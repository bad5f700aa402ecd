"""``python -m tools.bench [overhead|data_parallel] [--blocks N] [--output FOLDER]``: print, write JSON and Markdown."""

from __future__ import annotations

import argparse
import json
import os
import platform
from pathlib import Path
from typing import Any


def machine() -> dict[str, Any]:
    """What the figures were taken on."""
    import torch

    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    model = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "unknown")
    return {
        "processor": model,
        "cores": len(os.sched_getaffinity(0)),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "load_before": os.getloadavg()[0],
    }


def markdown(results: dict[str, Any]) -> str:
    """The tables of all benchmarks that ran."""
    parts = ["# Benchmarks", "", ", ".join(f"{key} {value}" for key, value in results["machine"].items()), ""]
    if "overhead" in results:
        row = results["overhead"]
        parts += [
            f"## Overhead: {row['what']}",
            "",
            "| engine, µs a step | hand-written, µs a step | ratio of medians | paired difference, µs |",
            "|---|---|---|---|",
            (
                f"| {row['engine_us']:.0f} | {row['hand_us']:.0f} | {row['ratio_of_medians']:.4f} "
                f"| {row['overhead_us_paired_median']:+.0f} |"
            ),
            "",
        ]
    if "data_parallel" in results:
        parts += [
            "## Data parallel, 2 ranks, one thread each, bf16",
            "",
            "| case | contestant | ms a step | tokens/s | Camshaft's speed over it |",
            "|---|---|---|---|---|",
        ]
        parts += [
            f"| {row['case']} | {row['contestant']} | {row['step_ms']:.1f} | {row['tokens_per_s']:.0f} "
            f"| {row['camshaft_speed_over_it']:.3f} |"
            for row in results["data_parallel"]
        ]
        parts.append("")
    return "\n".join(parts)


def main() -> None:
    """Run what was asked for."""
    parser = argparse.ArgumentParser(prog="python -m tools.bench", description=__doc__)
    parser.add_argument("which", nargs="*", choices=["overhead", "data_parallel", []], default=[])
    parser.add_argument("--blocks", type=int, help="timed blocks of each contestant")
    parser.add_argument("--case", action="append", default=[], help="only this case of data_parallel; may be repeated")
    parser.add_argument("--output", type=Path, default=Path("runs/bench"), help="folder of bench.json and bench.md")
    arguments = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    from tools.bench import data_parallel, overhead

    benchmarks = {"overhead": overhead.run, "data_parallel": data_parallel.run}
    results: dict[str, Any] = {"machine": machine()}
    for name in arguments.which or benchmarks:
        results[name] = benchmarks[name](arguments.blocks, arguments.case)
    text = markdown(results)
    arguments.output.mkdir(parents=True, exist_ok=True)
    (arguments.output / "bench.json").write_text(json.dumps(results, indent=1) + "\n")
    (arguments.output / "bench.md").write_text(text)
    print(text)
    print(f"written to {arguments.output}/bench.json and bench.md")


if __name__ == "__main__":
    main()
