"""A whole run with every kernel of ours, interpreted where there is no GPU, beside one with none."""

import yaml

TRITON = "interpreted"
OPS = ("rms_norm", "rope", "swiglu", "linear_cross_entropy", "adamw")


def recipe(folder, corpus, name, kernels, device):
    from camshaft.recipe import load

    tree = {
        "schema_version": 1, "name": name, "seed": 3,
        "model": {
            "vocab_size": 259, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
            "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 64,
            "tie_word_embeddings": True, "initializer_range": 0.05,
        },
        "tokenizer": {"type": "byte"},
        "data": {
            "train": {"files": [str(corpus / "documents.jsonl")]}, "validation_fraction": 0.0, "sequence_length": 16,
            "pack": True, "document_mask": True, "cache_dir": str(corpus / "cache"),
        },
        "batch": {"micro_batch_size": 2, "global_batch_size": 4},
        "training": {"max_steps": 2, "log_every": 1},
        "launch": {"device": device, "threads_per_rank": 1},
        "run": {"dir": str(folder / name)},
        "plugins": {
            "adamw": {"lr": 3e-3, "weight_decay": 0.1}, "clip": {"max_norm": 0.1}, "precision": {"compute": "fp32"},
            "kernels": kernels,
        },
    }  # fmt: skip
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(tree, sort_keys=False))
    return load(folder / f"{name}.yaml")


def test_trains_what_torch_trains(tmp_path, corpus):
    import torch

    from camshaft.testing.compare import assert_within, compare
    from camshaft.testing.run import record_rank

    device = "cuda" if torch.cuda.is_available() else "cpu"
    plain = record_rank(0, 1, recipe(tmp_path, corpus, "plain", None, device))
    fused = record_rank(0, 1, recipe(tmp_path, corpus, "fused", dict.fromkeys(OPS, "triton"), device))
    assert len(plain) == 2 and all(record.norm > 0.1 for record in plain), "clipping, which AdamW does, must be active"
    # fp32: what rounding in another order makes, as between ranks (tests/parity).
    bounds = {"gradients": 1e-4, "norm": 2e-6, "weights": 1e-5, "optimizer": 1e-4, "loss": 2e-6, "lr": 1e-15}
    assert_within(compare(fused, plain), bounds)
    assert any(not torch.equal(one, plain[0].gradients[name]) for name, one in fused[0].gradients.items())
    told = (tmp_path / "fused" / "kernels.txt").read_text().splitlines()[1:]
    assert [line.split()[:3] for line in told] == [[op, "triton", "triton"] for op in OPS]
