"""``python -m tools.schedules NAME -p RANKS -m MICROBATCHES``: build, check, simulate and draw a pipeline schedule."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from camshaft_pipeline import table
from camshaft_pipeline.checker import check_schedule
from camshaft_pipeline.drawing import svg, text, trace
from camshaft_pipeline.errors import ScheduleError
from camshaft_pipeline.replay import Times
from camshaft_pipeline.schedule import Schedule
from camshaft_pipeline.schedules import FAMILIES, make
from camshaft_pipeline.simulator import simulate


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m tools.schedules", description=__doc__)
    parser.add_argument("name", help=f"{', '.join(FAMILIES)}, or a CSV file with a row for each rank")
    parser.add_argument("--ranks", "-p", type=int, default=4)
    parser.add_argument("--microbatches", "-m", type=int, default=8)
    parser.add_argument("--virtual-stages", "-v", type=int, help="stages of a rank; default: the schedule's own")
    for option, default in (("forward", 1.0), ("inputs", 1.0), ("weights", 1.0), ("transfer", 0.0)):
        parser.add_argument(f"--{option}", type=float, default=default, help=f"time of it; default {default:g}")
    parser.add_argument("--width", type=int, default=120, help="columns of the drawing")
    parser.add_argument("--svg", type=Path, help="write the drawing as SVG")
    parser.add_argument("--trace", type=Path, help="write it as a Chrome or Perfetto trace")
    parser.add_argument("--csv", type=Path, help="write the programs as a table")
    return parser.parse_args()


def main() -> None:
    """Print the drawing; exit status 2 for a schedule that cannot be."""
    chosen = arguments()
    try:
        schedule = _schedule(chosen)
        check_schedule(schedule, schedule.microbatches)
    except ScheduleError as error:
        sys.exit(_told(error))
    timeline = simulate(schedule, Times(chosen.forward, chosen.inputs, chosen.weights, chosen.transfer))
    print(text.draw(timeline, chosen.width))
    for path, content in ((chosen.svg, svg.draw), (chosen.trace, trace.draw)):
        if path is not None:
            path.write_text(content(timeline))
    if chosen.csv is not None:
        chosen.csv.write_text(table.write(schedule))


def _schedule(chosen: argparse.Namespace) -> Schedule:
    path = Path(chosen.name)
    if path.suffix == ".csv":
        return table.read(path.read_text(), path.stem, str(path))
    return make(chosen.name, chosen.ranks, chosen.microbatches, chosen.virtual_stages)


def _told(error: ScheduleError) -> int:
    print(f"error: {error}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    main()
