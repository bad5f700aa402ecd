"""``python -m tools.bench [NAME ...] [--blocks N] [--output FOLDER]``: print, write JSON and Markdown."""

from __future__ import annotations

import argparse
import json
import os
import platform
from collections.abc import Callable, Sequence
from functools import partial
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
    if "sharded_overhead" in results:
        parts += sharded_overhead_table(results["sharded_overhead"])
    if "sharded" in results:
        parts += race_tables("Sharded data parallel: 2 ranks, one thread each, bf16 by autocast", results["sharded"])
    if "tensor" in results:
        parts += race_tables("Tensor parallel: 2 ranks, one thread each, fp32", results["tensor"])
    if "pipeline" in results:
        parts += race_tables("Pipelines: 2 and 4 ranks, one thread each, fp32", results["pipeline"])
    if "pipeline_sleep" in results:
        parts += sleep_table(results["pipeline_sleep"])
    if "kernels" in results:
        from tools.bench.kernels import table as kernels_table

        parts += kernels_table(results["kernels"])
    if "single_gpu" in results:
        from tools.bench.single_gpu import table

        parts += table(results["single_gpu"])
    return "\n".join(parts)


def sharded_overhead_table(rows: list[dict[str, Any]]) -> list[str]:
    """One row a contestant."""
    verdict = {True: "met", False: "missed", None: ""}
    return [
        "## Sharded data parallel: overhead on one rank, llama-nano, fp32",
        "",
        "| case | contestant | us a step | over the bare loop, us (paired median) | at most | |",
        "|---|---|---|---|---|---|",
        *(
            f"| {row['case']} | {row['contestant']} | {row['step_us']:.0f} | {row['over_bare_us']:+.0f} "
            f"| {'' if row['target_us'] is None else format(row['target_us'], '.0f')} | {verdict[row['met']]} |"
            for row in rows
        ),
        "",
    ]


def race_tables(title: str, results: dict[str, Any]) -> list[str]:
    """Contestants, then targets."""
    return [
        f"## {title}",
        "",
        "| case | contestant | ms a step | tokens/s | peak of tensors, MiB | growth of the process, MiB |",
        "|---|---|---|---|---|---|",
        *(
            f"| {row['case']} | {row['contestant']} | {row['step_ms']:.1f} | {row['tokens_per_s']:.0f} "
            f"| {row['tensors_mb']:.0f} | {row['resident_mb']:.0f} |"
            for row in results["rows"]
        ),
        "",
        "| case | ours | peer | our speed over it | at least | our peak memory over it | |",
        "|---|---|---|---|---|---|---|",
        *(
            f"| {row['case']} | {row['ours']} | {row['peer']} | {row['speed']:.3f} | {row['wanted']} "
            f"| {row['memory']:.3f} | {'met' if row['met'] else 'missed'} |"
            for row in results["targets"]
        ),
        "",
    ]


def sleep_table(rows: list[dict[str, Any]]) -> list[str]:
    """One row a schedule and size."""
    return [
        "## Pipelines of stages that sleep: a measured step over the simulated one",
        "",
        "| schedule | ranks | microbatches | simulated, ms | Camshaft | torch | |",
        "|---|---|---|---|---|---|---|",
        *(
            f"| {row['schedule']} | {row['ranks']} | {row['microbatches']} | {row['simulated_ms']:.0f} "
            f"| {row['ours']:.4f} | {row['torch']:.4f} "
            f"| {'met' if row['met'] else 'missed'} |"
            for row in rows
        ),
        "",
    ]


def write(results: dict[str, Any], folder: Path) -> None:
    """Put ``results`` into files of ``folder``; what a killed process leaves there is whole."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in (("bench.json", json.dumps(results, indent=1) + "\n"), ("bench.md", markdown(results))):
        partly = folder / f".{name}.{os.getpid()}"
        partly.write_text(text)
        partly.replace(folder / name)


def check_contestants(chosen: Sequence[str]) -> None:
    """Refuse names that no benchmark knows, which would leave all of its contestants out.

    Raises:
        SystemExit: there is none of a name.
    """
    from tools.bench import kernels_forms, pipeline, sharded, single_gpu, tensor

    known = dict.fromkeys(
        [
            *sharded.ALONE,
            *sharded.TOGETHER,
            *tensor.ENTRIES,
            *pipeline.CONTESTANTS,
            *single_gpu.NAMES,
            *kernels_forms.NAMES,
        ]
    )
    unknown = [name for name in chosen if name not in known]
    if unknown:
        raise SystemExit(f"no contestant {unknown}; there are: {', '.join(known)}")


def main() -> None:
    """Run what was asked for."""
    names = ["overhead", "data_parallel", "sharded", "sharded_overhead", "tensor", "pipeline", "pipeline_sleep"]
    names += ["single_gpu", "kernels"]
    parser = argparse.ArgumentParser(prog="python -m tools.bench", description=__doc__)
    parser.add_argument("which", nargs="*", choices=[*names, []], default=[], metavar="NAME", help=", ".join(names))
    parser.add_argument("--blocks", type=int, help="timed blocks of each contestant")
    parser.add_argument("--case", action="append", default=[], help="only this case; may be repeated")
    parser.add_argument(
        "--contestant", action="append", default=[], help="of those that divide, only this contestant; may be repeated"
    )
    parser.add_argument("--output", type=Path, default=Path("runs/bench"), help="folder of bench.json and bench.md")
    chosen = parser.parse_args()
    os.environ |= {"OMP_NUM_THREADS": "1", "KINETO_LOG_LEVEL": "9"}  # one thread; the profiler keeps quiet
    check_contestants(chosen.contestant)
    from tools.bench import data_parallel, kernels, overhead, pipeline, pipeline_sleep, sharded, single_gpu, tensor

    benchmarks: dict[str, Callable[[], Any]] = {
        "overhead": lambda: overhead.run(chosen.blocks, chosen.case),
        "data_parallel": lambda: data_parallel.run(chosen.blocks, chosen.case),
        "sharded": lambda: sharded.run(chosen.blocks, chosen.case, chosen.contestant),
        "sharded_overhead": lambda: sharded.run_overhead(chosen.blocks, chosen.case, chosen.contestant),
        "tensor": lambda: tensor.run(chosen.blocks, chosen.case, chosen.contestant),
        "pipeline": lambda: pipeline.run(chosen.blocks, chosen.case, chosen.contestant),
        "pipeline_sleep": lambda: pipeline_sleep.run(chosen.blocks, chosen.case),
        "single_gpu": lambda: single_gpu.run(chosen.blocks, chosen.contestant, partial(keep, "single_gpu")),
        "kernels": lambda: kernels.run(chosen.blocks, chosen.case, chosen.contestant, partial(keep, "kernels")),
    }
    results: dict[str, Any] = {"machine": machine()}

    def keep(name: str, found: Any) -> None:
        results[name] = found
        write(results, chosen.output)

    for name in chosen.which or names:
        keep(name, benchmarks[name]())
    print(markdown(results))
    print(f"written to {chosen.output}/bench.json and bench.md")


if __name__ == "__main__":
    main()
