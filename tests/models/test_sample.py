from __future__ import annotations

import pytest
import torch
from model_reference import built, odd

from camshaft.models.sample import generate

CONFIG = odd(tie_word_embeddings=True, max_position_embeddings=8)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def test_greedy_text_is_the_likeliest_token_each_time():
    model = built(CONFIG)
    tokens = generate(model, [5, 6, 7], 4, temperature=0)
    assert tokens[:3] == [5, 6, 7] and len(tokens) == 7
    for place in range(3, 7):
        logits = model.logits(torch.tensor([tokens[:place]]))
        assert tokens[place] == int(logits[0, -1].argmax())


def test_the_context_is_bounded():
    model = built(CONFIG)
    tokens = generate(model, list(range(20)), 3, temperature=0)
    assert tokens == [*range(20), *generate(model, list(range(12, 20)), 3, temperature=0)[8:]]
    short = generate(model, [1, 2, 3, 4], 1, temperature=0, context=2)
    assert short[-1] == generate(model, [3, 4], 1, temperature=0)[-1]


def test_a_seed_gives_the_text_again_and_another_seed_another():
    model = built(CONFIG)
    first = generate(model, [1], 12, generator=seeded())
    assert first == generate(model, [1], 12, generator=seeded())
    assert first != generate(model, [1], 12, generator=seeded(1))


def test_top_k_keeps_to_the_likeliest():
    model = built(CONFIG)
    best = set(model.logits(torch.tensor([[3]]))[0, -1].topk(4).indices.tolist())
    drawn = {generate(model, [3], 1, temperature=50.0, top_k=4, generator=seeded(n))[-1] for n in range(60)}
    assert drawn == best
    wide = {generate(model, [3], 1, temperature=50.0, top_k=1000, generator=seeded(n))[-1] for n in range(60)}
    assert len(wide) > 4
    assert generate(model, [3], 3, top_k=1) == generate(model, [3], 3, temperature=0)


def test_frequencies_follow_the_softmax():
    model = built(odd(vocab_size=3, initializer_range=0.5))
    wanted = (model.logits(torch.tensor([[2]]))[0, -1].detach() / 2.0).softmax(-1)
    random = seeded()
    drawn = torch.tensor([generate(model, [2], 1, temperature=2.0, generator=random)[-1] for _ in range(600)])
    got = drawn.bincount(minlength=3) / 600
    assert float((got - wanted).abs().max()) < 5 * 0.5 / 600**0.5


def test_it_ends_after_the_stop_token_and_leaves_the_mode_alone():
    model = built(CONFIG).train()
    full = generate(model, [5, 6], 6, temperature=0)
    stop = full[3]
    assert generate(model, [5, 6], 6, temperature=0, stop=stop) == full[: full.index(stop, 2) + 1]
    assert model.training and all(parameter.grad is None for parameter in model.parameters())
    assert generate(model.eval(), [5], 0) == [5] and not model.training


@pytest.mark.parametrize("arguments", [{"prompt": []}, {"temperature": -1.0}, {"top_k": 0}])
def test_senseless_arguments_are_refused(arguments):
    prompt = arguments.pop("prompt", [1])
    with pytest.raises(ValueError, match="generate needs"):
        generate(built(CONFIG), prompt, 1, **arguments)
