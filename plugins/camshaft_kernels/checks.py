"""What ``validate`` says of a recipe's kernels. Importing this imports no torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from camshaft.errors import Problem
from camshaft.host import plugin_class
from camshaft.recipe.suggest import nearest
from camshaft_kernels.offers import OFFERS, Offer
from camshaft_kernels.registry import AUTO, COMPILER, OPS, PROVIDERS, own_form

if TYPE_CHECKING:
    from camshaft.claims import PlanContext

Wishes = Mapping[str, str]
"""Operation to provider, or ``auto``."""

MADE_BY_FUSED = "linear_cross_entropy makes the loss, and no logits"
"""Why ``cross_entropy`` is not called."""


def fact(op: str, provider: str) -> str:
    """What the plan of a plugin provides that offers ``provider`` of ``op``."""
    return f"kernel:{op}/{provider}"


class Checks:
    """Every check of one recipe's wishes. ``key``: of the plugin in the recipe."""

    def __init__(self, wishes: Wishes, context: PlanContext, name: str) -> None:
        self.wishes, self.context, self.key, self._name = wishes, context, f"plugins.{name}", name
        stated = context.recipe.launch.device
        self.device = context.device if context.device != "any" or stated == "auto" else stated
        self.foreign = self._others_have("build_model")
        """Whether another plugin builds a model of its own, of which nothing is known here."""
        self.bars = dict(self._bars())
        """Operation to why no provider of it can be of use in this recipe."""

    def requires(self) -> tuple[str, ...]:
        """Facts that plugins with kernels of their own have to provide."""
        return tuple(fact(op, wish) for op, wish in self.wishes.items() if wish != AUTO and self._is_theirs(op, wish))

    def problems(self) -> Iterator[Problem]:
        """Every fault."""
        if not any(wish != own_form(op) for op, wish in self.wishes.items()):
            yield Problem(
                "no operation gets another implementation than it has without this plugin",
                key=self.key,
                fix=f"name one, such as {self.key}.linear_cross_entropy=torch, set {self.key}.all={AUTO}, or remove "
                f"{self.key}",
            )
        for op, wish in self.wishes.items():
            if wish != AUTO:
                yield from self._named(op, wish)

    def _named(self, op: str, wish: str) -> Iterator[Problem]:
        key, offer = f"{self.key}.{op}" if op in OPS else f"{self.key}.others.{op}", self._offer(op, wish)
        if offer is None and not self._is_theirs(op, wish):
            yield self._unknown(op, wish, key)
            return
        if op in self.bars and wish != own_form(op):
            yield Problem(
                f"'{wish}' would have no effect: {self.bars[op]}", key=key, fix=f"set it to {AUTO}, or remove the line"
            )
            return
        if offer is None:
            return
        lack = None if self.device == "any" else offer.lack(self.device)
        if lack is not None:
            yield Problem(lack[0], key=key, fix=f"{lack[1]}; {AUTO} takes what is there")
        if not offer.compiles and COMPILER in self.context.plugins:
            yield Problem(
                f"'{wish}' works on lists of lengths, which '{COMPILER}' would trace anew for every batch",
                key=key,
                fix=f"set it to {AUTO}, or remove plugins.{COMPILER}",
            )

    def _unknown(self, op: str, wish: str, key: str) -> Problem:
        given = [*OFFERS.get(op, {}), AUTO]
        if wish in PROVIDERS:
            return Problem(f"'{wish}' has no {op}", key=key, fix=f"take one of {', '.join(given)}")
        near = nearest(wish, given)
        if near:
            message = f"nobody offers '{wish}' of {op}. Did you mean '{near}'?"
            return Problem(message, key=key, fix=f"use '{near}'")
        fix = f"take one of {', '.join(given)}, or enable a plugin that offers '{wish}'"
        return Problem(f"nobody offers '{wish}' of {op}", key=key, fix=fix)

    def _offer(self, op: str, wish: str) -> Offer | None:
        return OFFERS.get(op, {}).get(wish)

    def _is_theirs(self, op: str, wish: str) -> bool:
        """Whether another plugin may offer it: none of ours, and one with kernels of its own is enabled."""
        return self._offer(op, wish) is None and self._others_have("kernels")

    def _others_have(self, hook: str) -> bool:
        others = (each for each in self.context.plugins if each != self._name)
        return any(hasattr(plugin_class(each), hook) for each in others)

    def _bars(self) -> Iterator[tuple[str, str]]:
        if self.context.mesh["tp"].degree > 1:
            divided = "tensor parallel divides the vocabulary, and makes projection and loss in its own way"
            yield "linear_cross_entropy", divided
            yield "cross_entropy", divided
        else:
            fused, loss = (self._named_wish(op) for op in ("linear_cross_entropy", "cross_entropy"))
            if fused:
                yield "cross_entropy", MADE_BY_FUSED
            elif loss:
                yield "linear_cross_entropy", "cross_entropy is named, which needs the logits"
        if self.foreign:
            return
        data = self.context.recipe.data
        masked = data.pack and data.document_mask
        if masked:
            yield "attention", "data.document_mask makes every attention one inside of documents: document_attention"
        else:
            yield "document_attention", "data.document_mask is off: plain causal attention is used"
        for op, known in OPS.items():
            if known.place == "nowhere":
                yield op, "the built-in decoder has no such operation"

    def _named_wish(self, op: str) -> bool:
        """Whether the recipe names another implementation of ``op`` than its own form."""
        return self.wishes.get(op, AUTO) not in (AUTO, own_form(op))
