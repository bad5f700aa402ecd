"""Which names and values are taken for secrets, and which ordinary ones are not."""

from __future__ import annotations

import pytest

from camshaft import host
from camshaft.recipe import secrets
from camshaft.recipe.schema import Recipe


@pytest.mark.parametrize(
    "name",
    [
        "api_key", "apikey", "API-KEY", "apiKey", "wandb_api_key", "WANDB_API_KEY", "hf_token", "token", "authToken",
        "access_token", "AUTH_TOKEN", "client_secret", "secret", "secretKey", "secrets", "password", "db_password",
        "Passwd", "passphrase", "credential", "aws_credentials", "private_key", "ssh_key", "access_key_id", "pwd",
        "AWS_SECRET_ACCESS_KEY", "bearer", "jwt", "authorization",
    ],
)  # fmt: skip
def test_secret_names(name: str) -> None:
    assert secrets.is_secret_name(name)


@pytest.mark.parametrize(
    "name",
    [
        "max_tokens", "max_token", "tokens", "tokenizer", "eos_token", "pad_token", "bits_per_token", "token_bytes",
        "json_key", "key", "keys", "monkey", "keyboard", "num_key_value_heads", "tokens_per_s", "qk_norm", "author",
        "HOME", "SLURM_JOB_ID", "passes",
    ],
)  # fmt: skip
def test_ordinary_names(name: str) -> None:
    assert not secrets.is_secret_name(name)


def test_no_key_of_ours_is_named_like_a_secret() -> None:
    models = [Recipe, *(host.plugin_class(name).Options for name in host.installed())]
    sections = [field.annotation for field in Recipe.model_fields.values() if hasattr(field.annotation, "model_fields")]
    names = [name for model in [*models, *sections] for name in model.model_fields]
    assert len(names) > 50
    assert [name for name in names if secrets.is_secret_name(name)] == []


@pytest.mark.parametrize(
    "text",
    [
        "https://user:pw@host/x", "s3://key@bucket", "see postgres://a:b@c", "https://h/x?token=abc&y=1",
        "hf_" + "a" * 34, "ghp_" + "A1" * 20, "AKIA" + "A" * 16, "-----BEGIN RSA PRIVATE KEY-----", "sk-" + "a" * 40,
    ],
)  # fmt: skip
def test_secret_values(text: str) -> None:
    assert secrets.has_secret_shape(text)


@pytest.mark.parametrize(
    "text",
    ["https://host/path", "https://host/@user", "a@b.c", "runs/x", "https://h/?page=2", "hf_model", "task-" + "a" * 40],
)
def test_ordinary_values(text: str) -> None:
    assert not secrets.has_secret_shape(text)
