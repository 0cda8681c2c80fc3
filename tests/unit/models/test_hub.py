"""`push --to hf:NAME` and `model.weights=hf:NAME`, against a stand-in of the Hub's HTTP API, by its real client."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import safetensors.torch

from hpc_supcon import cli
from hpc_supcon.errors import ConfigError, HubError
from hpc_supcon.hub_names import hub_name
from hpc_supcon.models import build_encoder, load_weights
from tests.commands import run
from tests.fault.runs import events
from tests.hub_server import TOKEN, hub_server
from tests.unit.export.test_export import untrained

CONV = ["model.encoder=conv", "data.synthetic={images: 24, classes: 3, channels: 3, image_size: 16}"]
RUN = [
    "data.source=synthetic", *CONV, "data.batch_size=8", "train.iterations=1", "log.tensorboard=false",
    "runtime.threads=1", "model.projection_hidden=8", "model.projection_dim=8",
]  # fmt: skip
# one new interpreter for several commands: its client of the Hub reads the environment when it is imported
COMMANDS = """
import io, json, sys
from contextlib import redirect_stderr, redirect_stdout
from hpc_supcon import cli
answers = []
for arguments in json.loads(sys.argv[1]):
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        try:
            cli.main(arguments)
        except SystemExit as stopped:
            code = stopped.code or 0
    answers.append([code, out.getvalue(), err.getvalue()])
print(json.dumps(answers))
"""


def commands(home, server, *each, **environment):
    """[(exit code, stdout, stderr)] of commands whose Hub is `server`."""
    ours = {"HF_ENDPOINT": server.url, "HF_HOME": str(home), "HF_HUB_DISABLE_PROGRESS_BARS": "1", **environment}
    env = {name: value for name, value in os.environ.items() if not name.startswith("HF_")} | ours
    arguments = json.dumps([[str(a) for a in command] for command in each])
    done = subprocess.run([sys.executable, "-c", COMMANDS, arguments], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture
def folder(tmp_path):
    return untrained(tmp_path / "run", *CONV)


def one_line(answer, *parts):
    code, out, err = answer
    assert (code, out, err.count("\n")) == (2, "", 1), err
    assert all(part in err for part in parts), err


def test_a_model_is_pushed_in_one_commit_and_loaded_at_a_revision(folder, tmp_path):
    pushing = ["push", folder, "--to", "hf:somebody/conv", "--no-page", "--license", "mit"]
    pretrain = ["pretrain", "default", *RUN]
    with hub_server() as server:
        first, again, *loaded = commands(
            tmp_path / "home", server, pushing, pushing,
            [*pretrain, "model.weights=hf:somebody/conv", f"run_dir={tmp_path}/a"],
            [*pretrain, "model.weights=hf:somebody/nothing", f"run_dir={tmp_path}/x"],
            [*pretrain, "model.weights=hf:somebody/conv@nowhere", f"run_dir={tmp_path}/x"],
            HF_TOKEN=TOKEN,
        )  # fmt: skip
        commits = server.repositories["somebody/conv"]
        assert [first[0], again[0]] == [0, 0], first
        assert first[1].startswith(f"{server.url}/somebody/conv/commit/{commits[0][0]}: 4 files, ")
        files = {"README.md", "config.json", "model.safetensors", "projection.safetensors"}
        assert [set(content) for _, content in commits] == [files] * 2
        assert "hf-hub:somebody/conv" not in commits[0][1]["README.md"].decode(), "timm cannot build conv"
        assert "model.weights=hf:somebody/conv" in commits[0][1]["README.md"].decode()

        assert loaded[0][0] == 0, loaded[0]
        (event,) = events(tmp_path / "a", "weights")
        assert (event["path"], event["commit"]) == ("hf:somebody/conv", commits[-1][0])
        assert f"from hf:somebody/conv (commit {commits[-1][0]}, sha256 {event['sha256'][:12]})" in loaded[0][2]
        one_line(loaded[1], "hf:somebody/nothing: no such model on the Hub, or a private one", "hf auth login")
        one_line(loaded[2], "hf:somebody/conv@nowhere: the model has no such branch, tag or commit")
        assert not (tmp_path / "x").exists()

        # a pinned commit, whatever came after it; then without a network, from the cache; then without both
        changed = {name: t + 1 for name, t in safetensors.torch.load(commits[0][1]["model.safetensors"]).items()}
        server.commit("somebody/conv", {"model.safetensors": safetensors.torch.save(changed)})
        pinned = [*pretrain, f"model.weights=hf:somebody/conv@{commits[0][0]}"]
        (online,) = commands(tmp_path / "home", server, [*pinned, f"run_dir={tmp_path}/b"])
        assert online[0] == 0, online
    cached, missing, push_offline = commands(
        tmp_path / "home", server, [*pinned, f"run_dir={tmp_path}/c"],
        [*pretrain, "model.weights=hf:other/model", f"run_dir={tmp_path}/x"],
        ["push", folder, "--to", "hf:somebody/conv", "--no-page"],
        HF_HUB_OFFLINE="1", HF_TOKEN=TOKEN,
    )  # fmt: skip
    assert cached[0] == 0, cached
    later = [*events(tmp_path / "b", "weights"), *events(tmp_path / "c", "weights")]
    assert len(later) == 2
    assert all(e["commit"] == commits[0][0] and e["sha256"] == event["sha256"] for e in later)
    one_line(missing, "hf:other/model: model.safetensors is not in the cache, and the Hub cannot be reached")
    one_line(push_offline, "--to hf:somebody/conv: ")


def test_a_push_that_cannot_be_is_one_line_and_leaves_no_commit(folder, tmp_path):
    pushing = ["push", folder, "--to", "hf:somebody/conv", "--no-page"]
    with hub_server() as server:
        one_line(*commands(tmp_path / "home", server, pushing), "no token for the Hugging Face Hub: log in with")
        one_line(*commands(tmp_path / "home", server, pushing, HF_TOKEN="hf_wrong"), "--to hf:somebody/conv")
        assert not server.repositories
        server.refused_commits = True
        (answer,) = commands(tmp_path / "home", server, pushing, HF_TOKEN=TOKEN)
        one_line(answer, "--to hf:somebody/conv (its repository is made, and empty): the Hub did not do it: ")
        assert server.repositories == {"somebody/conv": []}
    gone = commands(tmp_path / "home", server, pushing, HF_TOKEN=TOKEN)
    one_line(*gone, "--to hf:somebody/conv: the Hub did not do it: ")


def test_from_the_hub_only_safetensors_are_read(tmp_path):
    with hub_server() as server:
        server.repositories["a/pickled"] = []
        server.commit("a/pickled", {"pytorch_model.bin": b"\x80\x04", "config.json": b"{}"})
        pretrain = ["pretrain", "default", *RUN, "model.weights=hf:a/pickled", f"run_dir={tmp_path}/x"]
        (answer,) = commands(tmp_path / "home", server, pretrain)
        one_line(answer, "hf:a/pickled: has no model.safetensors; only models in safetensors are read from the Hub")
        assert not [line for line in server.requests if "pytorch_model.bin" in line]


@pytest.mark.parametrize(
    "text", ["hf:", "hf:a/b/c", "hf:../b", "hf:a/b@", "hf:a/b@../c", "hf:a b", "hf:a/b@-x", "hf:/b"]
)
def test_names_that_cannot_be_are_refused_at_the_door(capsys, tmp_path, text):
    with pytest.raises(ConfigError, match="hf:OWNER/NAME"):
        hub_name("model.weights", text)
    code, _, err = run(capsys, "config", "default", f"model.weights={json.dumps(text)}")
    assert (code, err.count("\n")) == (2, 1)
    assert f"model.weights={text}: a model on the Hugging Face Hub is hf:OWNER/NAME" in err


def test_names_and_revisions():
    assert hub_name("x", "hf:timm/resnet18.a1_in1k") == ("timm/resnet18.a1_in1k", None)
    assert hub_name("x", "hf:gpt2@refs/pr/1") == ("gpt2", "refs/pr/1")


def test_a_folder_without_weights_is_named(folder, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match=r"empty: no model\.safetensors in this folder; give a file of weights"):
        load_weights(build_encoder("conv", image_size=16), tmp_path / "empty")
    with pytest.raises(ConfigError, match="it is a run folder: make one of it with `hpc-supcon push`"):
        load_weights(build_encoder("conv", image_size=16), folder)


def test_a_folder_of_another_encoder_says_which_one_it_has(folder, tmp_path, capsys):
    assert run(capsys, "push", str(folder), "--to", str(tmp_path / "model"), "--no-page")[0] == 0
    encoder = build_encoder("resnet9_small")
    with pytest.raises(
        ConfigError, match=r"weights of another architecture: .* Its config.json names conv: see model"
    ):
        load_weights(encoder, tmp_path / "model")
    loaded = load_weights(build_encoder("conv", image_size=16), tmp_path / "model")
    assert loaded.path == str(tmp_path / "model/model.safetensors")
    assert (loaded.commit, loaded.missing, loaded.unexpected) == (None, [], [])


def test_without_the_package_of_the_hub_the_extra_is_named(monkeypatch, capsys, folder, tmp_path):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(SystemExit, match="2"):
        cli.main(["push", str(folder), "--to", str(tmp_path / "m")])
    assert "pip install 'hpc-supcon[hub]'" in capsys.readouterr().err
    assert HubError.exit_code == 2
