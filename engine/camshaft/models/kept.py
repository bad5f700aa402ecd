"""What the built-in decoder keeps from forward to backward with torch's own operations. By arithmetic, without torch.

T = b s tokens of a microbatch, h features, n query and m key/value heads of width d, i inner features of the MLP, V
tokens in the vocabulary; widths in bytes: p of parameters and of the residual stream, c of what matrix products take
and make, w = max(p, 4). A layer keeps, on CUDA: 2 T h p + 2 T w of the norms and their sums; the products' inputs,
2 T h p, or under autocast (c < p) 5 T h c, because each product casts its own, and a copy of every weight; T d (2 n +
2 m) c + b n s w of attention; 4 T i c of the MLP. With h = n d = m d, i = 4 h / 1.5 and p = c = 2 that is 34.7 s b h.

On a CPU torch composes RMSNorm of other operations, which keep T h w more each, and the input in w bytes; and a mask
of documents is kept by each layer, as b s s numbers of c bytes. On CUDA it is kept too, beside key and value heads that
are repeated for each query head, because the kernel that takes a mask takes no groups. In fp64, and with grouped heads
in fp32, CUDA has no kernel but the one that stores all scores: n b s s c.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from camshaft.activations import Kept, Made

if TYPE_CHECKING:
    from camshaft.claims import Widths
    from camshaft.models.config import ModelConfig

INDEX = 8
"""Bytes of a token id."""


@dataclass(frozen=True, slots=True)
class Form:
    """A microbatch: ``rows`` of ``length`` tokens, with ``documents`` in them that attention keeps apart or without."""

    rows: int
    length: int
    documents: bool
    device: str
    """``cpu``, or else what torch does on CUDA."""

    @property
    def tokens(self) -> int:
        """Tokens of a microbatch."""
        return self.rows * self.length


def kept(config: ModelConfig, widths: Widths, form: Form, stages: Mapping[str, int]) -> tuple[Kept, ...]:
    """The table of one whole microbatch, undivided, in forward order.

    Args:
        config: the architecture.
        widths: bytes of an element.
        form: shape of a microbatch, and where it runs.
        stages: stage of each matrix and norm that a rank has (``model.layers.0.mlp.gate_proj.weight``); what modules
            keep whose parameters are not among them is left out.
    """
    table = _Table(config, widths, form)
    modules = {name.rpartition(".")[0]: stage for name, stage in stages.items()}
    found: list[Kept] = []
    if "model.embed_tokens" in modules:
        found.append(Kept("model.embed_tokens", "tokens", "input", form.tokens * INDEX))
    inner = {name: stage for name, stage in modules.items() if name.startswith("model.layers.")}
    for stage in sorted(set(inner.values())):
        size = form.tokens * config.head_dim * table.wide
        found += [Kept("model.rotary_emb", name, "rotation", size, stage=stage) for name in ("cos", "sin")]
        layers = sorted({int(name.split(".")[2]) for name, place in inner.items() if place == stage})
        found += [entry for layer in layers for entry in table.layer(f"model.layers.{layer}", stage)]
    return (*found, *table.head(modules.get("model.norm")))


class _Table:
    """Entries by module."""

    def __init__(self, config: ModelConfig, widths: Widths, form: Form) -> None:
        self.config, self.form = config, form
        self.param, self.compute = widths.param, min(widths.compute, widths.param)
        self.casts = self.compute < self.param
        self.wide = max(self.param, 4)
        self.composed = form.device == "cpu"
        grouped = config.num_attention_heads > config.num_key_value_heads and not form.documents
        self.stores = not self.composed and (self.compute > 4 or (self.compute == 4 and grouped))
        """Whether attention stores all scores: CUDA has no other kernel in fp64, nor for grouped heads in fp32."""

    def layer(self, name: str, stage: int) -> Iterator[Kept]:
        """One layer ``name``."""
        yield from self.norm(f"{name}.input_layernorm", stage, "input")
        yield from self._attention(f"{name}.self_attn", stage)
        yield from self.norm(f"{name}.post_attention_layernorm", stage, "product")
        yield from self._mlp(f"{name}.mlp", stage)

    def norm(self, name: str, stage: int, made: Made) -> Iterator[Kept]:
        """The norm of hidden states that ``made`` makes, without its result, which who takes it keeps."""
        features = self.form.tokens * self.config.hidden_size
        yield from self._norm(name, stage, made, features, self.form.tokens)

    def _norm(self, name: str, stage: int, made: Made, features: int, groups: int, width: int = 0) -> Iterator[Kept]:
        """``width``: bytes of what comes in, where it is not the residual stream."""
        width = width or self.param
        copied = width < self.wide and (self.composed or self.casts)
        yield Kept(name, "hidden", "norm" if copied else made, features * (self.wide if copied else width), stage=stage)
        yield Kept(name, "rstd", "norm", groups * self.wide, 3.0 * features, stage=stage)
        if self.composed:
            yield Kept(name, "normed", "norm", features * self.wide, 1.0 * features, stage=stage)

    def _inputs(self, norm: str, users: tuple[str, ...], stage: int) -> Iterator[Kept]:
        """The result of ``norm``, as the products of ``users`` keep it: one tensor, or one cast for each."""
        size = self.form.tokens * self.config.hidden_size
        names = [f"output for {user}" for user in users] if self.casts else ["output"]
        for name in names:
            yield Kept(norm, name, "norm", size * self.compute, 4.0 * size, stage=stage)

    def _weight(self, module: str, rows: int, columns: int, stage: int) -> Iterator[Kept]:
        if self.casts:
            yield Kept(module, "weight", "weight", rows * columns * self.compute, stage=stage)

    def _product(self, module: str, name: str, inputs: int, outputs: int, stage: int) -> Kept:
        tokens = self.form.tokens
        return Kept(module, name, "product", tokens * outputs * self.compute, 2.0 * tokens * inputs * outputs, 1, stage)

    def _attention(self, name: str, stage: int) -> Iterator[Kept]:
        config, form = self.config, self.form
        hidden, queries = config.hidden_size, config.num_attention_heads * config.head_dim
        keys = config.num_key_value_heads * config.head_dim
        yield from self._inputs(name.replace("self_attn", "input_layernorm"), ("q_proj", "k_proj", "v_proj"), stage)
        for leaf, width in (("q_proj", queries), ("k_proj", keys), ("v_proj", keys)):
            yield from self._weight(f"{name}.{leaf}", width, hidden, stage)
        if config.qk_norm:
            for leaf, width in (("q_norm", queries), ("k_norm", keys)):
                features = form.tokens * width
                groups = features // config.head_dim
                yield from self._norm(f"{name}.{leaf}", stage, "product", features, groups, self.compute)
        repeated = self.stores or (form.documents and not self.composed)
        width = queries if repeated else keys
        size = form.tokens * self.compute
        yield Kept(name, "q", "rotation", size * queries, 6.0 * form.tokens * queries, stage=stage)
        also = " for each query head" if repeated else ""
        yield Kept(name, f"k{also}", "rotation", size * width, 6.0 * form.tokens * keys, stage=stage)
        yield Kept(name, f"v{also}", "product", size * width, 2.0 * form.tokens * hidden * keys, stage=stage)
        yield from self._scores(name, queries, stage)
        yield from self._weight(f"{name}.o_proj", hidden, queries, stage)

    def _scores(self, name: str, queries: int, stage: int) -> Iterator[Kept]:
        form, heads = self.form, self.config.num_attention_heads
        if form.documents and not self.stores:
            size = form.tokens * form.length
            yield Kept(name, "mask", "attention", size * self.compute, 1.0 * size, stage=stage)
        # Half of the square of tokens, twice: scores, and sums of values.
        flops = 2.0 * form.tokens * form.length * queries
        if self.stores:
            scores = form.tokens * form.length * heads
            yield Kept(name, "scores", "attention", scores * self.compute, flops / 2, stage=stage)
        else:
            yield Kept(name, "logsumexp", "attention", form.tokens * heads * max(self.compute, 4), stage=stage)
        yield Kept(name, "out", "attention", form.tokens * queries * self.compute, flops, stage=stage)

    def _mlp(self, name: str, stage: int) -> Iterator[Kept]:
        hidden, inner = self.config.hidden_size, self.config.intermediate_size
        yield from self._inputs(name.replace("mlp", "post_attention_layernorm"), ("gate_proj", "up_proj"), stage)
        for leaf in ("gate", "up"):
            yield from self._weight(f"{name}.{leaf}_proj", inner, hidden, stage)
            yield self._product(name, leaf, hidden, inner, stage)
        size = self.form.tokens * inner
        yield Kept(name, "silu", "activation", size * self.compute, 4.0 * size, stage=stage)
        yield Kept(name, "activated", "activation", size * self.compute, 1.0 * size, stage=stage)
        yield from self._weight(f"{name}.down_proj", hidden, inner, stage)

    def head(self, stage: int | None) -> Iterator[Kept]:
        """Last norm, projection and loss. The logits themselves go when the cross-entropy has its own fp32 numbers."""
        if stage is None:
            return
        yield from self.norm("model.norm", stage, "input")
        tokens, vocabulary = self.form.tokens, self.config.vocab_size
        yield from self._inputs("model.norm", ("lm_head",), stage)
        yield from self._weight("lm_head", vocabulary, self.config.hidden_size, stage)
        flops = 3.0 * tokens * vocabulary
        yield Kept("loss", "log_softmax", "loss", tokens * vocabulary * self.wide, flops, stage=stage)
        yield Kept("loss", "labels", "loss", tokens * INDEX, stage=stage)
        yield Kept("loss", "total_weight", "loss", self.wide, stage=stage)
