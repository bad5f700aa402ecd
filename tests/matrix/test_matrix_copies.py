"""What several ranks hold of the model they hold bit-equal, and tied copies too, while 50 steps go by."""

import pytest
import torch
import torch.distributed as dist
from matrix_cases import FULL, Combination
from matrix_runs import recipe_of

from camshaft.distributed import Environment
from camshaft.loop import session
from camshaft.plugin import Plugin, hookimpl
from camshaft.rundir import RunDirectory
from camshaft.testing.ranks import RankFailed, run_ranks
from camshaft.testing.record import weights
from camshaft.testing.run import Quiet

STEPS = 50
LOOKS = (0, STEPS // 2, STEPS - 1)
BORROWED = "lm_head.weight, of another stage"
TABLE = "model.embed_tokens.weight"
CASES = [
    Combination("ddp", "tp + sp", "1f1b", "fp64 AdamW"),
    Combination("none", "tp + sp", "zbv", "fp64 AdamW"),
    Combination("none", "tp", "gpipe", "bf16 AdamW"),
    Combination("zero 3", "-", "interleaved_1f1b", "fp64 AdamW"),
    Combination("zero 2", "tp", "-", "bf16 AdamW"),
    Combination("none", "tp + sp", "-", "fp64 SGD"),
]


class Looks(Plugin):
    """Compares this rank's model with the whole one, after a window's backwards and before its step."""

    def __init__(self):
        super().__init__()
        self.seen = []

    @hookimpl
    def reduce(self, state):
        if state.step in LOOKS:
            self.look(state)

    def look(self, state):
        world, model = state.world, state.model
        whole = weights(world, model)  # refuses unequal copies of what is updated
        boxes = everybodys_boxes(world)
        names = [name for name, _ in model.named_parameters()] if world.readable else []
        held = {name: (model.get_parameter(name), name) for name in names}
        head = getattr(model, "lm_head", None)
        if head is not None and not isinstance(head.weight, torch.nn.Parameter):
            held[BORROWED] = (head.weight, TABLE)
        for place, (tensor, name) in held.items():
            box = world.boxes.get(name) or boxes.get((name, world.mesh.place["tp"]))
            wanted = whole[name] if box is None else whole[name][rectangle(box, tensor.shape)]
            assert torch.equal(tensor.detach(), wanted.to(tensor.dtype)), f"{place} is another on rank {world.rank}"
        self.seen.append((state.step, *held))


def everybodys_boxes(world):
    """(parameter, place along tp) to its rectangle, of those that other stages have as well."""
    found = [None] * world.world_size
    dist.all_gather_object(found, {(name, world.mesh.place["tp"]): box for name, box in world.boxes.items()})
    return {key: box for of_rank in found for key, box in of_rank.items()}


def rectangle(box, shape):
    return tuple(slice(at, at + size) for at, size in zip(box.offset, shape, strict=True))


class Disturbs(Plugin):
    """Changes one copy of a norm by the least there is, on one rank."""

    @hookimpl
    def post_step(self, state):
        if state.world.rank == 1 and state.step == 3:
            with torch.no_grad():
                norm = state.model.model.norm.weight
                norm[0] = torch.nextafter(norm[0], torch.full_like(norm[0], 9.0))


def on_rank(rank, world_size, resolved, disturbed):
    looks = Looks()
    observers = {"looks": looks, **({"disturbs": Disturbs()} if disturbed else {})}
    environment = Environment(rank, rank, world_size, world_size, "torchrun")
    with session(resolved, environment, RunDirectory(resolved.recipe.run.dir), observers) as trainer:
        trainer.train(Quiet(), Quiet())
        looks.look(trainer.state) if disturbed else None
    return looks.seen


@pytest.mark.parametrize("combination", CASES if FULL else CASES[::2], ids=str)
def test_copies_are_bit_equal_on_all_their_ranks(make_recipe, combination):
    resolved = recipe_of(make_recipe, combination, STEPS)
    ranks = run_ranks(combination.ranks, on_rank, resolved, False, timeout_s=120)
    for seen in ranks:
        assert [step for step, *_ in seen] == list(LOOKS)
    borrowed = combination.pipeline != "-" and resolved.recipe.model.tie_word_embeddings
    assert borrowed == any(BORROWED in names for seen in ranks for _, *names in seen)


def test_one_bit_on_one_rank_is_seen(make_recipe):
    resolved = recipe_of(make_recipe, Combination("none", "tp", "-", "fp64 AdamW"), 6)
    with pytest.raises(RankFailed, match=r"unequal copies of 'model.norm.weight'"):
        run_ranks(2, on_rank, resolved, True, timeout_s=60)
