"""Drawings in the terminal, as SVG and as a trace, alone and with what was measured."""

from __future__ import annotations

import json
from itertools import pairwise
from xml.etree import ElementTree

import pytest

from camshaft.program import Action, Kind
from camshaft_pipeline.drawing import svg, text, trace
from camshaft_pipeline.errors import ScheduleError
from camshaft_pipeline.replay import Times
from camshaft_pipeline.schedules import FAMILIES, make
from camshaft_pipeline.simulator import simulate

SVG = "{http://www.w3.org/2000/svg}"


def simulated(name="1f1b", p=2, m=3, times=None):
    return simulate(make(name, p, m), times)


def measured(timeline, factor, late=100.0):
    """The simulation, slower by ``factor``, on a clock that started earlier; transfers are there too."""
    spans = [span for spans in timeline.spans for span in spans]
    return [(s.rank, s.action, late + factor * s.start, late + factor * s.end) for s in (*spans, *timeline.transfers)]


def test_a_drawing_in_the_terminal():
    assert text.draw(simulated(), 43) == "\n".join(
        [
            "1f1b, 2 rank(s): 12, of which bubble 3 (33.3 % of the ideal); up to 2 activations a rank",
            "rank 0 F0-F1-......B0----F2-B1----...B2----",
            "rank 1 ...F0-B0----F1-B1----F2-B2----......",
            "F forward  B backward  . waits  a column is 0.333",
        ]
    )


def test_names_are_as_long_as_there_is_room():
    timeline = simulated("zbv")
    assert "F0@3-" in text.draw(timeline, 200) and "I0@3" in text.draw(timeline, 200)
    assert "@" not in text.draw(timeline, 90) and "F2-" in text.draw(timeline, 90)
    narrow = text.draw(timeline, 40).splitlines()
    assert set("".join(row.removeprefix("rank ")[1:] for row in narrow[1:3])) <= set(" FIW-.")


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("width", [20, 80, 333])
def test_columns_are_in_proportion_and_rows_as_wide_as_asked(name, width):
    timeline = simulated(name, 4, 8, Times(2, 1, 1, 0.5))
    rows = text.draw(timeline, width).splitlines()[1:5]
    for row, busy in zip(rows, timeline.busy, strict=True):
        line = row.removeprefix("rank ").split(" ", 1)[1]
        assert len(row) == width
        shown = sum(letter != "." for letter in line) / len(line)
        assert shown == pytest.approx(busy / timeline.makespan, abs=32 / len(line) / 2)


def test_what_was_measured_stands_below_each_rank():
    timeline = simulated()
    lines = text.draw(timeline, 60, measured(timeline, 1.25)).splitlines()
    assert lines[0].endswith("; measured 15, 1.250 x")
    assert [line.split()[0] for line in lines[1:5]] == ["rank", "measured", "rank", "measured"]
    assert lines[2].endswith("..B2------") and lines[1].endswith(".........")


def test_a_measurement_of_an_unknown_rank_is_refused():
    with pytest.raises(ScheduleError, match="measured F0 on rank 7, and the schedule has 2 ranks"):
        text.draw(simulated(), 60, [(7, Action(Kind.F, 0), 0.0, 1.0)])


def test_a_rank_that_measured_nothing_has_an_empty_row():
    timeline = simulated()
    some = [span for span in measured(timeline, 1) if span[0] == 0]
    assert set(text.draw(timeline, 60, some).splitlines()[4].removeprefix("  measured ")) == {"."}


@pytest.mark.parametrize("name", FAMILIES)
def test_svg_is_one_image_with_a_box_for_each_action(name):
    timeline = simulated(name, 3, 4, Times(2, 1, 1, 0.5))
    count = sum(map(len, timeline.spans))
    for spans, factor in ((None, 1), (measured(timeline, 1.1), 2)):
        image = svg.draw(timeline, 900, spans)
        root = ElementTree.fromstring(image)
        boxes = [box for box in root.iter(f"{SVG}rect") if box.find(f"{SVG}title") is not None]
        assert len(boxes) == factor * count and root.get("width") == "900"
        for box in boxes:
            left, wide = float(box.get("x")), float(box.get("width"))
            assert left >= 90 and left + wide <= 896.01
        assert "href" not in image and "<script" not in image and "<style" not in image
        assert len(image) < 600 * len(boxes) + 3000
    titles = {title.text for title in root.iter(f"{SVG}title")}
    assert "forward, microbatch 0, stage 0: 0 to 2" in titles and "forward, microbatch 0, stage 0: 0 to 2.2" in titles


def test_svg_boxes_of_a_row_do_not_overlap():
    root = ElementTree.fromstring(svg.draw(simulated("zbv", 4, 9, Times(3, 2, 1))))
    rows: dict[str, list[tuple[float, float]]] = {}
    for box in root.iter(f"{SVG}rect"):
        if box.find(f"{SVG}title") is not None:
            left = float(box.get("x"))
            rows.setdefault(box.get("y"), []).append((left, left + float(box.get("width"))))
    assert len(rows) == 4
    for boxes in rows.values():
        boxes.sort()
        assert all(end <= start + 0.02 for (_, end), (start, _) in pairwise(boxes))


def test_a_trace_holds_simulated_and_measured_as_processes():
    timeline = simulated(times=Times(0.002, 0.001, 0.001, 0.0005))
    events = json.loads(trace.draw(timeline, measured(timeline, 1.5)))["traceEvents"]
    named = {(e["pid"], e["tid"], e["name"]): e["args"]["name"] for e in events if e["ph"] == "M"}
    assert named[0, 0, "process_name"] == "simulated 1f1b" and named[1, 0, "process_name"] == "measured"
    assert named[0, 1, "thread_name"] == named[1, 1, "thread_name"] == "rank 1"
    slices = [e for e in events if e["ph"] == "X"]
    assert len(slices) == 2 * sum(map(len, timeline.spans))
    first, slower = (next(e for e in slices if e["pid"] == pid and e["name"] == "B0@1") for pid in (0, 1))
    assert (first["ts"], first["dur"], first["cat"]) == (pytest.approx(4500), pytest.approx(2000), "backward")
    assert (slower["ts"], slower["dur"]) == (pytest.approx(6750), pytest.approx(3000))
    assert first["args"] == {"microbatch": 0, "stage": 1} and first["tid"] == 1


def test_transfers_are_events_that_begin_and_end():
    timeline = simulated(times=Times(2, 1, 1, 0.5))
    events = json.loads(trace.draw(timeline, microseconds=1000))["traceEvents"]
    assert {event["pid"] for event in events} == {0}
    begins, ends = ({e["id"]: e["ts"] for e in events if e["ph"] == phase} for phase in "be")
    assert len(begins) == 6 and begins.keys() == ends.keys()
    assert all(ends[each] == begins[each] + 500 for each in begins)
