"""How the built-in decoder is divided along the axis of matrix products: a style for modules by name.

The words are explained where they are acted on, by the plugin that owns that axis. Importing this imports no torch.
"""

from __future__ import annotations

from camshaft.models.config import ModelConfig


def llama_plan(config: ModelConfig) -> dict[str, str]:
    """Glob over module names to style, of ``camshaft.models.llama.Llama``; where several match, the last one counts.

    Attention and MLP are regions (Shoeybi et al., arXiv:1909.08053, section 3): a product divided by columns goes in,
    one divided by rows comes out. Attention is cut between heads only; key and value heads may be shared by ranks.
    Both tables are divided by vocabulary, and so is the cross-entropy.
    """
    head = config.head_dim
    attention, mlp = "model.layers.*.self_attn", "model.layers.*.mlp"
    plan = {
        "model.embed_tokens": "embedding",
        attention: "region",
        f"{attention}.q_proj": f"column:{head}",
        f"{attention}.[kv]_proj": f"shared:{head}",
        f"{attention}.o_proj": f"row:{head}",
        mlp: "region",
        f"{mlp}.gate_proj": "column",
        f"{mlp}.up_proj": "column",
        f"{mlp}.down_proj": "row",
        "lm_head": "logits",
        "loss": "loss",
    }
    return {**plan, f"{attention}.[qk]_norm": "inner"} if config.qk_norm else plan
