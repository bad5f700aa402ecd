"""The Llama-family decoder: Llama 2 and 3, Qwen2 and Qwen3 are settings of it.

Parameter names and layouts are Hugging Face's (``model.layers.0.self_attn.q_proj.weight``, rotary pairs half a head
apart), so that state dicts need no conversion.
"""

from __future__ import annotations

from collections.abc import Iterator, MutableMapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from camshaft.models.config import ModelConfig
from camshaft.models.layers import Block, Embedding, Linear, RMSNorm, RotaryEmbedding
from camshaft.models.parallel import llama_plan
from camshaft.models.roles import roles
from camshaft.models.stages import LLAMA, Span
from camshaft.ops import IGNORED, LinearCrossEntropy, Ops

if TYPE_CHECKING:
    from camshaft.data.loader import Batch

__all__ = ["IGNORED", "Decoder", "Llama", "TokenLoss", "widen"]


class Decoder(nn.Module):
    """Embedding, layers and last norm."""

    def __init__(self, config: ModelConfig, ops: Ops) -> None:
        super().__init__()
        self.ops = ops
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size, config.initializer_range)
        self.rotary_emb = RotaryEmbedding(config)
        self.layers = nn.ModuleList(Block(config, ops) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps, ops=ops)

    def forward(
        self,
        tokens: Tensor,
        positions: Tensor,
        document: Tensor | None,
        hidden: Tensor | None = None,
        span: Span | None = None,
    ) -> Tensor:
        """Hidden states [b, s, hidden_size]; arguments as in ``Batch``, each [b, s].

        With ``span`` only those layers run, from ``hidden``, and the norm only behind the last.
        """
        if hidden is None:
            hidden = self.embed_tokens(tokens)
        rope = self.rotary_emb(positions, torch.promote_types(hidden.dtype, torch.float32))
        mask = None if document is None else self.ops.document_mask(document)
        for layer in self.layers if span is None else self._layers(span):
            hidden = layer(hidden, rope, mask)
        normed: Tensor = hidden if span is not None and not span.last else self.norm(hidden)
        return normed

    def _layers(self, span: Span) -> Iterator[nn.Module]:
        """By name: where layers of other stages were removed, positions in the list say nothing."""
        return (self.layers.get_submodule(str(index)) for index in range(span.begin, span.end))


def widen(logits: Tensor) -> Tensor:
    """To fp32, or as it is if it is wider."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


class TokenLoss(nn.Module):
    """Sum of the tokens' cross-entropies, in fp32 or wider. Exactly 0 where no token is counted."""

    def __init__(self, ops: Ops | None = None) -> None:
        super().__init__()
        self.ops = ops or Ops()

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        """``logits`` [b, s, vocabulary], ``labels`` int64 [b, s] with -100 for tokens that are not counted."""
        return self.ops.cross_entropy(logits, labels)


class Head(Linear):
    """The output projection. Given labels it goes on to the loss in one operation, where the table has one."""

    def __init__(self, config: ModelConfig, fused: LinearCrossEntropy) -> None:
        super().__init__(config.hidden_size, config.vocab_size, config.initializer_range)
        self.fused = fused

    def forward(self, hidden: Tensor, labels: Tensor | None = None) -> Tensor:
        """Logits of ``hidden`` [b, s, hidden_size], or with ``labels`` the sum of the token losses."""
        return super().forward(hidden) if labels is None else self.fused(hidden, self.weight, labels)


class Llama(nn.Module):
    """Decoder, output projection and loss.

    Build it under ``torch.device("meta")`` and give it values with ``camshaft.models.init.materialize``. A tied
    ``lm_head.weight`` is the same parameter as ``model.embed_tokens.weight``, and state dicts hold it once.
    """

    pipeline = LLAMA

    def __init__(self, config: ModelConfig, ops: Ops | None = None) -> None:
        super().__init__()
        ops = ops or Ops()
        self.config = config
        self.spans: dict[int, Span] = {}
        self.model = Decoder(config, ops)
        self.fused = ops.linear_cross_entropy is not None
        if ops.linear_cross_entropy is None:
            self.lm_head = Linear(config.hidden_size, config.vocab_size, config.initializer_range)
        else:
            self.lm_head = Head(config, ops.linear_cross_entropy)
        self.loss = TokenLoss(ops)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight
            self.register_state_dict_post_hook(_omit_tied)  # type: ignore[no-untyped-call]
            self.register_load_state_dict_pre_hook(_restore_tied)  # type: ignore[no-untyped-call]

    def forward(self, batch: Batch) -> Tensor:
        """Sum of the token losses of a microbatch: a scalar, fp32 (fp64 in an fp64 model).

        Of a stage that is not the last: the hidden states [b, s, hidden_size] that it ends with.
        """
        span = None if batch.stage is None else self.spans[batch.stage]
        place = () if span is None else (batch.hidden, span)  # a decoder of one's own need not know of stages
        hidden: Tensor = self.model(batch.tokens, batch.positions, batch.document, *place)
        if span is not None and not span.last:
            return hidden
        if self.fused:
            return self.lm_head(hidden, batch.labels)  # type: ignore[no-any-return]
        loss: Tensor = self.loss(self.lm_head(hidden), batch.labels)
        return loss

    def logits(self, tokens: Tensor, positions: Tensor | None = None, document: Tensor | None = None) -> Tensor:
        """Logits [b, s, vocabulary] of ``tokens`` int64 [b, s], fp32 or wider; positions count from 0 by default."""
        if positions is None:
            positions = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
        return widen(self.lm_head(self.model(tokens, positions, document)))

    def roles(self) -> dict[str, str]:
        """First name of each parameter to ``matrix``, ``embedding``, ``norm`` or ``bias``."""
        return roles(self)

    def tensor_parallel_plan(self) -> dict[str, str]:
        """Which style each module has where matrix products are divided over ranks: glob over names to style."""
        return llama_plan(self.config)


TABLE, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def _omit_tied(module: nn.Module, state: MutableMapping[str, Any], prefix: str, metadata: Any) -> None:
    if prefix + TABLE in state:
        state.pop(prefix + HEAD, None)


def _restore_tied(module: nn.Module, state: MutableMapping[str, Any], prefix: str, *rest: Any) -> None:
    if prefix + TABLE in state:
        state.setdefault(prefix + HEAD, state[prefix + TABLE])
