"""What the ledger counts in a run: ddp's bytes against theory, records, ledger.json and the closing table."""

import json
import logging

import pytest

from camshaft import Plugin, hookimpl
from camshaft.testing.ranks import run_ranks
from camshaft.testing.run import record_rank

PLUGINS = {"adamw": {"lr": 1e-3}, "clip": {"max_norm": 1.0}, "ledger": {}}


class Records(Plugin):
    def __init__(self):
        super().__init__()
        self.found = []

    @hookimpl
    def log(self, record):
        self.found.append({name: value for name, value in record.items() if name.startswith("plugin/ledger/")})


def counted(rank, world_size, resolved):
    lines = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())
    logger = logging.getLogger("camshaft.ledger")
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    records = Records()
    steps = record_rank(rank, world_size, resolved, {"records": records})
    elements = sum(weight.numel() for weight in steps[0].weights.values())
    return records.found, len(steps), elements, lines


@pytest.mark.parametrize("world_size", [2, 4])
def test_ddp_sends_what_theory_says_in_every_step_whatever_the_accumulation(make_recipe, world_size, tmp_path):
    resolved = make_recipe(PLUGINS, world_size)
    (found, steps, elements, lines), *others = run_ranks(world_size, counted, resolved, timeout_s=100)
    theory = 2 * (world_size - 1) / world_size * 4 * elements
    for record in found:
        sent = record["plugin/ledger/ddp/dp/all_reduce/bytes_per_step"]
        assert theory <= sent <= 1.03 * theory + 64 * 100, "padding and flags of small buckets come on top"
        assert sent == found[0]["plugin/ledger/ddp/dp/all_reduce/bytes_per_step"]
    assert len(found) == steps == 20
    summary = json.loads((tmp_path / f"run{world_size}" / "ledger.json").read_text())
    rows = {(row["plugin"], row["axis"], row["op"]): row for row in summary["rows"]}
    assert summary["steps"] == steps and summary["world_size"] == world_size
    ddp = rows["ddp", "dp", "all_reduce"]
    assert ddp["bytes"] == pytest.approx(steps * sent) and ddp["bytes_per_step"] == pytest.approx(sent)
    order = rows["ddp", "dp", "broadcast"]
    assert order["calls"] == 1, "the order of the buckets, once in the run"
    assert any("ddp     dp" in line and "all_reduce" in line for line in lines), lines
    assert all(not other[3] for other in others), "rank 0 alone speaks"


def test_one_process_sends_nothing_and_says_so(make_recipe):
    resolved = make_recipe({"adamw": {"lr": 1e-3}, "ledger": {}}, 1)
    found, steps, _, _ = counted(0, 1, resolved)
    assert len(found) == steps == 20
    assert all(record == {"plugin/ledger/bytes_per_step": 0.0} for record in found)
