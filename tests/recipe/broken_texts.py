# ruff: noqa: E501  (a table: one case, one entry)
"""Broken recipes whose text, names, secrets, references, overrides or bases are refused."""

from __future__ import annotations

from recipe_cases import HIDDEN, Case, one, override, recipe

# fmt: off
YAML = [
    Case("alias", recipe(name="name: &n good  #!", model="model: {preset: *n}  #!"),
         (("name", "an anchor", "extends"), ("model.preset", "an alias", "extends"))),
    one("tag", "seed", "a tag", "remove the tag", seed="seed: !!python/object/apply:os.system [ls]  #!"),
    one("local tag", "name", "a tag", name="name: !env good  #!"),
    one("two documents", "", "more than one YAML document", text=recipe() + "---  #!\nname: x\n"),
    one("tab", "", "a tab where YAML allows only spaces", "indent with spaces", training="training:\n\tmax_steps: 5  #!"),
    one("open bracket", "", "not valid YAML", "brackets", text=recipe() + "run: {root: x  #!\n"),
    one("open quote", "", "not valid YAML", extra='run: {root: "x}  #!'),
    one("no mapping", "", "not a mapping of keys to values", text="- 1  #!\n"),
    one("not UTF-8", "", "not UTF-8 text", "save the file as UTF-8", text=recipe().encode() + b"run: {root: '\xff'}  #!\n"),
    one("control character", "", "control character", text=recipe() + "run: {root: 'a\x00'}  #!\n"),
    one("escaped control character", "run.root", "control characters", extra='run: {root: "a\\0"}  #!'),
    one("half a surrogate pair", "run.root", "surrogate", extra='run: {root: "\\ud800"}  #!'),
    one("deep nesting", "", "deeper than 32 levels", "flatten", text=recipe() + f"run: {'[' * 40}{']' * 40}  #!\n"),
    one("deep block nesting", "", "deeper than 32 levels",
        text=recipe() + "run:\n" + "".join(f"{' ' * n}a:{'  #!' if n == 32 else ''}\n" for n in range(1, 300))),
    one("huge", "", "larger than 1 MiB", text="#!" + "x" * (1 << 20) + "\n" + recipe()),
    Case("alias bomb", recipe(extra="run:\n  root: &a [1]  #!\n  dir: &b [*a, *a]  #!#!#!"),
         (("run.root", "an anchor", ""), ("run.dir.0", "an alias", ""), ("run.dir.1", "an alias", ""), ("run.dir", "an anchor", ""))),
]

NAMES = [
    one(f"name {text}", "name", message, name=f"name: {text}  #!")
    for text, message in {
        "../../etc": "folder of the output root",
        "a/b": "folder of the output root",
        ".hidden": "cannot start with a dot",
        "..": "cannot start with a dot",
        "'a\\b'": "folder of the output root",
        "a b": "folder of the output root",
        '"a\\nb"': "folder of the output root",
        "x" * 65: "1 to 64",
        "''": "1 to 64",
        "con": "on every system",
        "NUL.txt": "on every system",
        "Com1": "on every system",
        "dot.": "on every system",
        "ünder": "folder of the output root",
    }.items()
]

SECRETS = [
    one("api key", "plugins.fancy.api_key", "named like a secret", "environment variable",
        plugins=f"plugins:\n  ddp: {{}}\n  adamw: {{lr: 1}}\n  fancy:\n    required_text: x\n    api_key: {HIDDEN}  #!"),
    one("token at the root", "hf_token", "named like a secret", extra=f"hf_token: {HIDDEN}  #!"),
    one("camel case", "run.authToken", "named like a secret", extra=f"run: {{authToken: {HIDDEN}}}  #!"),
    one("deep inside", "model.rope_scaling.client_secret", "named like a secret",
        model=f"model: {{preset: llama-tiny, rope_scaling: {{client_secret: {HIDDEN}}}}}  #!"),
    one("password in a list", "data.train.blend.0.password", "named like a secret",
        data=f"data:\n  train:\n    blend:\n    - prefix: x\n      password: {HIDDEN}  #!"),
    one("secret as wrong type", "plugins.password", "named like a secret",
        plugins=f"plugins:\n  ddp: {{}}\n  adamw: {{lr: 1}}\n  password: {HIDDEN}  #!"),
    one("URL with a user", "run.root", "URL with user information", extra=f"run: {{root: 'https://me:{HIDDEN}@host/x'}}  #!"),
    one("URL with a token in its query", "run.root", "secret in its query", extra=f"run: {{root: 'https://h/x?access_token={HIDDEN}'}}  #!"),
    one("known form of a key", "run.root", "known kind of access key", extra=f"run: {{root: hf_{HIDDEN * 2}}}  #!"),
    one("secret from the environment", "run.root", "'WANDB_API_KEY' is named like a secret", extra="run: {root: '${env:WANDB_API_KEY}'}  #!"),
    Case("URL from the environment", recipe(extra="run: {root: '${env:PLACE}'}  #!"),
         (("run.root", "the environment puts a URL with user information here", ""),), environ={"PLACE": f"s3://a:{HIDDEN}@b"}),
    override("override with a secret", f"plugins.wandb.api_key={HIDDEN}", "plugins.wandb.api_key", "named like a secret"),
    override("override with a mapping", f"plugins.wandb={{api_key: {HIDDEN}}}", "plugins.wandb.api_key", "named like a secret"),
    override("override with a URL", f"run.root=https://me:{HIDDEN}@host", "run.root", "URL with user information"),
    override("malformed override with a secret", f"plugins.wandb.api_key:{HIDDEN}", "", "'...' is not a usable override"),
    one("in a file with a syntax error", "", "not valid YAML", text=f"password: {HIDDEN}\nx: [  #!"),
]

ENVIRONMENT = [
    one("variable not set", "seed", "'CAMSHAFT_TEST_UNSET' is not set", ":-default}", seed="seed: ${env:CAMSHAFT_TEST_UNSET}  #!"),
    one("other interpolation", "run.root", "'${HOME}' is not interpolated", "${env:NAME}", extra="run: {root: '${HOME}/x'}  #!"),
    one("resolver of others", "run.root", "'${oc.env:HOME}' is not interpolated", extra="run: {root: '${oc.env:HOME}'}  #!"),
    one("open brace", "run.root", "without a matching '}'", extra="run: {root: '${env:HOME'}  #!"),
    one("empty name", "run.root", "not interpolated", extra="run: {root: '${env:}'}  #!"),
    Case("wrong type from the environment", recipe(seed="seed: ${env:SEED}  #!"),
         (("seed", "whole number, got 'x1'", ""),), environ={"SEED": "x1"}),
    Case("nothing twice", recipe(seed="seed: ${env:SEED}  #!"),
         (("seed", "holds '${'", ""),), environ={"SEED": "${env:HOME}"}),
]

OVERRIDES = [
    override("no equals sign", "training.max_steps", "", "'training.max_steps' is not a usable override", "section.key=value"),
    override("empty key", "=5", "", "is not a usable override"),
    override("empty part", "training..max_steps=5", "", "'training..max_steps' is not a usable override"),
    override("no value", "training.max_steps=", "training.max_steps", "the value is missing"),
    override("misspelt key", "training.max_setps=5", "training.max_setps", "Did you mean 'max_steps'?"),
    override("type", "training.max_steps=soon", "training.max_steps", "whole number, got 'soon'"),
    override("open list", "plugins.adamw.betas=[0.9", "plugins.adamw.betas", "not valid YAML"),
    override("alias in an override", "name=*x", "name", "cannot start with '*'"),
    override("tag inside", "plugins.adamw={lr: !!float 1}", "plugins.adamw.lr", "a tag"),
    override("below a scalar", "name.x=1", "name.x", "'name' is 'good', which has no keys"),
    override("unknown plugin set", "plugins.adamv.lr=1", "plugins.adamv", "Did you mean 'adamw'?"),
    override("unknown plugin off", "plugins.dpd=null", "plugins.dpd", "Did you mean 'ddp'?"),
    override("comment is no comment", "name=foo #bar", "name", "folder of the output root"),
    override("bases by override", "extends=x.yaml", "extends", "chosen in the file"),
    override("too deep", ".".join("a" * 40) + "=1", "", "is not a usable override"),
    Case("list index", recipe(data="data:\n  train:\n    blend: [{prefix: a}]"),
         (("data.train.blend.1.weight", "a list of 1: it has no item '1'", "from 0 to 0"),),
         overrides=("data.train.blend.1.weight=2",)),
]

BASES = [
    one("missing base", "extends", "there is no file", "folder of this recipe", extends="extends: nowhere.yaml  #!"),
    one("base of a wrong kind", "extends", "must be the path of a recipe", extends="extends: {a: b}  #!"),
    one("base is null", "extends", "must be the path of a recipe", extends="extends:  #!"),
    one("base is a folder", "extends", "there is no file", extends="extends: ./  #!"),
    one("itself", "extends", "a cycle of extends: recipe.yaml -> recipe.yaml", extends="extends: recipe.yaml  #!"),
]

CASES = [*YAML, *NAMES, *SECRETS, *ENVIRONMENT, *OVERRIDES, *BASES]
