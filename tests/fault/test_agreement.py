"""Ranks that were started differently, and runs whose data changed, end with exit code 2 and one line, and change
nothing. Real processes for each."""

from __future__ import annotations

import os
import re
import shutil
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from hpc_supcon import checkpoint
from hpc_supcon.config import MAY_DIFFER, load_config, shared_settings
from hpc_supcon.training import agreement

from ..processes import Ranks
from . import injector
from .runs import Run, newest, run

CLASSES, PER_CLASS, BATCH = ("cat", "dog", "ship"), 40, 12
IMAGES = [
    "data.source=image_folder", "data.image_size=16", "data.batch_size=12", "model.encoder=conv", "probe.kind=knn",
    "model.projection_hidden=32", "model.projection_dim=16", "train.epochs=2", "checkpoint.every_epochs=null",
    "checkpoint.every_steps=3", "checkpoint.asynchronous=false", "log.tensorboard=false", "log.progress=false",
    "deterministic=true", "runtime.threads=1", "probe.knn.k=3",
]  # fmt: skip
STEPS_PER_EPOCH = 3 * PER_CLASS * 9 // 10 // BATCH


def rank():
    return int(os.environ["RANK"])


def of_rank():
    """The command, with $RANK in its arguments replaced, and arguments such as `1:--resume` on rank 1 alone."""
    arguments = [os.path.expandvars(a) for a in sys.argv[1:]]
    chosen = [a.partition(":") if re.match(r"\d:", a) else ("", "", a) for a in arguments]
    sys.argv[1:] = [a for number, _, a in chosen if number in ("", str(rank()))]
    injector.main()


def of_another_version():
    """Rank 1 has a torch of its own."""
    versions = agreement.versions()
    agreement.versions = lambda: versions | ({"torch": "2.9.9"} if rank() == 1 else {})
    of_rank()


def refused(tmp_path, *arguments, code=2, ranks=2, main=of_rank, **options):
    """What a run that all ranks refuse writes: one line."""
    before = listing(tmp_path)
    it = Run(ranks, tmp_path / "r", *arguments, main=main, **options)
    assert it.end() == [code] * ranks, it.stderr
    # a run that was killed before leaves its lock, which is told
    said = "".join(line for line in it.stderr.splitlines(keepends=True) if "taken over from" not in line)
    assert said.count("\n") == 1, said
    assert listing(tmp_path) == before, "nothing was written"
    return said.removeprefix("hpc-supcon: error: ").rstrip()


def listing(folder):
    files = [p for p in folder.rglob("*") if p.is_file() and p.suffix != ".stderr" and p.name != ".lock"]
    return {path: (path.stat().st_size, path.stat().st_mtime_ns) for path in files}


def make_images(root, per_class=PER_CLASS):
    rng = np.random.default_rng(0)
    for split, n in (("train", per_class), ("test", 4)):
        for name in CLASSES:
            (root / split / name).mkdir(parents=True)
            for i in range(n):
                pixels = rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(root / split / name / f"{i:03d}.png")
    return root


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return make_images(tmp_path_factory.mktemp("images") / "set")


# what is given differently, and what is said of it
DIFFERENT = {
    "seed": (["seed=$RANK"], "rank 1 has seed=1, rank 0 has seed=0"),
    "learning rate": (["optim.lr=0.1$RANK"], "rank 1 has optim.lr=0.11, rank 0 has optim.lr=0.1"),
    "batch size": (["1:data.batch_size=15"], "rank 1 has data.batch_size=15, rank 0 has data.batch_size=12"),
    "engine's settings": (
        ["train.engine=deepspeed", "train.deepspeed.config={communication_data_type: fp3$RANK}"],
        "rank 1 has train.deepspeed.config.communication_data_type=fp31, rank 0 has ",
    ),
    "timeout": (["runtime.timeout_s=4$RANK"], "rank 1 has runtime.timeout_s=41.0, rank 0 has runtime.timeout_s=40.0"),
    "--resume": (["1:--resume"], "rank 1 has --resume=yes, rank 0 has --resume=no"),
    "a setting that one rank refuses": (["1:optim.lr=-1"], "rank 1: override 'optim.lr=-1': optim.lr: input should"),
    "a recipe that one rank lacks": (["1:model.encoder=conf"], "rank 1: override 'model.encoder=conf': unknown"),
}


@pytest.mark.parametrize("what", DIFFERENT)
def test_ranks_with_different_settings(tmp_path, what):
    arguments, said = DIFFERENT[what]
    assert refused(tmp_path, *arguments).startswith(said)


def test_ranks_with_different_run_folders(tmp_path):
    said = refused(tmp_path, f"run_dir={tmp_path}/r$RANK")
    assert said.startswith(f"rank 1 has run_dir={tmp_path}/r1, rank 0 has run_dir={tmp_path}/r0")


def test_ranks_of_another_version(tmp_path):
    said = refused(tmp_path, main=of_another_version)
    assert said.startswith(f"rank 1 has torch=2.9.9, rank 0 has torch={torch.__version__};")


def test_ranks_with_another_command(tmp_path):
    it = Run(2, tmp_path / "r", stage="$RANK", main=of_another_command)
    assert it.end() == [2, 2]
    assert it.stderr.startswith("hpc-supcon: error: rank 1 has command=run, rank 0 has command=pretrain;")


def of_another_command():
    sys.argv[1] = ("pretrain", "run")[rank()]
    injector.main()


def test_of_four_ranks_those_are_named_that_differ(tmp_path):
    said = refused(tmp_path, "1:seed=1", "3:seed=1", "2:optim.lr=0.3", ranks=4)
    assert "ranks 1, 3 have seed=1, ranks 0, 2 have seed=0; rank 2 has optim.lr=0.3, ranks 0, 1, 3 have" in said


def test_ranks_with_another_file_of_weights(tmp_path):
    for folder in ("0", "1"):
        (tmp_path / folder).mkdir()
    run(1, tmp_path / "made", "train.epochs=1", "checkpoint.every_steps=null")
    for n in (0, 1):
        tensors = checkpoint.load_newest(tmp_path / "made/checkpoints")[0].tensors["model"]
        torch.save(
            {name.removeprefix("encoder."): t + n for name, t in tensors.items() if name.startswith("encoder.")},
            tmp_path / str(n) / "w.pt",
        )
    weights = f"model.weights={tmp_path}/$RANK/w.pt"
    assert refused(tmp_path, weights).startswith("model.weights: the file of rank 1 has another content than")


@pytest.fixture
def copies(images, tmp_path):
    """Two equal copies of the data, as two nodes may have them."""
    for n in (0, 1):
        shutil.copytree(images, tmp_path / f"copy{n}")
    return tmp_path


def delete(root):
    for i in range(30):
        (root / f"train/cat/{i:03d}.png").unlink()


def rename_class(root):
    for split in ("train", "test"):
        (root / split / "dog").rename(root / split / "eel")


def add_class(root):
    for split in ("train", "test"):
        shutil.copytree(root / split / "dog", root / split / "zebra")


def swap(root):
    for split in ("train", "test"):
        for old, new in (("cat", "x"), ("dog", "cat"), ("x", "dog")):
            (root / split / old).rename(root / split / new)


def lose(root):
    shutil.rmtree(root)


OTHER = "rank 1 has other data than rank 0: "


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            delete,
            f"{OTHER}27 images fewer in train (81, not 108; cat: 9, not 36); 3 images fewer in validation",
        ),
        (rename_class, f"{OTHER}class added: eel; class missing: dog"),
        (swap, f"{OTHER}files of another content in train"),
        (lose, "rank 1: image folder "),
    ],
)
def test_ranks_with_different_copies_of_the_data(copies, change, said):
    change(copies / "copy1")
    assert refused(copies, f"data.root={copies}/copy$RANK", settings=IMAGES).startswith(said)


def test_what_may_differ_may_differ(copies):
    differently = [f"data.root={copies}/copy$RANK", "1:runtime.threads=2", "1:data.workers=3", "1:data.download=true"]
    run(2, copies / "r", *differently, "train.epochs=1", main=of_rank, settings=IMAGES)
    assert newest(copies / "r") == STEPS_PER_EPOCH
    assert set(MAY_DIFFER) - set(shared_settings(load_config())) == {
        "runtime.threads", "data.workers", "data.download",
    }  # fmt: skip


def test_ranks_whose_run_folders_are_on_different_disks(tmp_path):
    """As seen from rank 1, there is nothing where rank 0 has the run."""
    run(2, tmp_path / "r", "train.epochs=1")
    it = Run(2, tmp_path / "r", "--resume", "train.epochs=1", main=on_a_disk_of_its_own)
    assert it.end() == [2, 2]
    said = "hpc-supcon: error: rank 1 has run_dir/config.yaml=absent, rank 0 has run_dir/config.yaml=sha256:"
    assert it.stderr.startswith(said)


def on_a_disk_of_its_own():
    from hpc_supcon import run_folder

    if rank() == 1:
        run_folder.identity = lambda folder: "absent"
    injector.main()


@pytest.fixture(scope="module")
def interrupted(images, tmp_path_factory):
    """(its data, a run that was killed in its second epoch: steps 12 and 15 are saved)."""
    folder = tmp_path_factory.mktemp("interrupted")
    shutil.copytree(images, folder / "data")
    it = Run(1, folder / "r", f"data.root={folder}/data", fault="kill@step=16", settings=IMAGES)
    assert it.end() == [-9]
    assert checkpoint.list_steps(folder / "r/checkpoints") == [12, 15]
    return folder


@pytest.fixture
def resumed(interrupted, tmp_path):
    """A function that resumes a copy of that run, whose data lie elsewhere meanwhile."""
    shutil.copytree(interrupted / "data", tmp_path / "data")
    shutil.copytree(interrupted / "r", tmp_path / "r")

    def resume(*arguments, code=0, ranks=1, **options):
        settings = [f"data.root={tmp_path}/data", "--resume", *arguments]
        if code:
            return refused(tmp_path, *settings, ranks=ranks, main=injector.main, settings=IMAGES, **options)
        return run(ranks, tmp_path / "r", *settings, settings=IMAGES, **options)

    return tmp_path / "data", resume


def test_data_that_moved_are_the_same_data(resumed):
    _, resume = resumed
    assert "going on from step 15\n" in resume()


def few(root):
    for i in range(4):
        (root / f"train/cat/{i:03d}.png").unlink()


ALLOW = "data.allow_change=true"
WHAT = "the data are not those that the run was trained on: "


@pytest.mark.parametrize(
    ("change", "said", "obstacle"),
    [
        (
            few,
            "4 images fewer in train (104, not 108; cat: 32, not 36)",
            "an epoch had 9 steps and would have 8, from which all later steps are numbered",
        ),
        (add_class, "class added: zebra", "an epoch had 9 steps and would have 12"),
        (swap, "files of another content in train", None),
        (rename_class, "class added: eel; class missing: dog", None),
    ],
)
def test_a_run_is_not_resumed_on_other_data(resumed, change, said, obstacle):
    root, resume = resumed
    change(root)
    refusal = resume(code=2)
    assert f"{WHAT}{said}" in refusal
    assert "data.allow_change=true" in refusal
    if obstacle is not None:
        assert f"{ALLOW} cannot go on with them: {obstacle}" in resume(ALLOW, code=2)
    else:
        told = resume(ALLOW)
        assert f"{WHAT}{said}" in told
        assert f"going on with them ({ALLOW})\n" in told


def test_two_ranks_refuse_other_data_together(resumed):
    root, resume = resumed
    add_class(root)
    assert f"{WHAT}class added: zebra" in resume("train.allow_world_size_change=true", code=2, ranks=2)


@pytest.fixture
def trained(images, tmp_path, made):
    """(its data, its run folder), in this test's own folder."""
    shutil.copytree(made, tmp_path / "run")
    return tmp_path / "run/data", tmp_path / "run/r"


@pytest.fixture(scope="module")
def made(images, tmp_path_factory):
    """A folder of a run that ended, and its data beside it, which it names relative to the folder."""
    folder = tmp_path_factory.mktemp("made")
    shutil.copytree(images, folder / "data")
    settings = [*IMAGES, "data.root=data", "train.epochs=1"]
    run(1, folder / "r", main=in_folder, environment={"FOLDER": folder}, settings=settings)
    return folder


def in_folder():
    os.chdir(os.environ["FOLDER"])
    injector.main()


def command(folder, *arguments, code=0, ranks=1):
    """stderr of a command on the run folder `folder`, in the folder that holds it."""
    it = Ranks(
        [str(a) for a in arguments], folder.with_suffix(".stderr"), ranks, environment={"FOLDER": folder.parent},
        main=in_folder,
    )  # fmt: skip
    assert it.end() == [code] * ranks, it.stderr
    return it.stderr


HERE = "run_dir=r"
CHANGED = "its data have changed since it was trained: "


def test_a_probe_says_that_its_run_s_data_changed(trained):
    root, folder = trained
    assert CHANGED not in command(folder, "probe", "r", HERE)
    shutil.copytree(root, folder.parent / "other")
    few(root)
    said = command(folder, "probe", "r", HERE)
    assert f"r: {CHANGED}4 images fewer in train (104, not 108; cat: 32, not 36)" in said
    assert CHANGED not in command(folder, "probe", "r", HERE, "data.root=other"), "other data are no change"
    assert CHANGED in command(folder, "prune", "r", HERE, "prune.rate=0.5")
    tuned = command(folder, "prune", "r", HERE, "prune.rate=0.5", "prune.label=b", "prune.finetune.iterations=3")
    assert tuned.count(CHANGED) == 1


@pytest.mark.parametrize("stage", ["probe", "prune"])
def test_probe_and_prune_refuse_other_classes(trained, stage):
    root, folder = trained
    rename_class(root)
    said = (
        "r: the data have other classes than its encoder was trained on: class added: eel; class missing: dog; give"
    )
    assert said in command(folder, stage, "r", HERE, code=2)


def test_ranks_that_probe_different_runs(trained):
    _, folder = trained
    shutil.copytree(folder, folder.with_name("r1"))
    it = Ranks(["probe", "0:r", "1:r1", HERE], folder.with_suffix(".stderr"), 2, main=of_rank_in_folder,
               environment={"FOLDER": folder.parent})  # fmt: skip
    assert it.end() == [2, 2]
    assert it.stderr.startswith(f"hpc-supcon: error: rank 1 has RUN_DIR={folder}1, rank 0 has RUN_DIR={folder};")


def of_rank_in_folder():
    os.chdir(os.environ["FOLDER"])
    of_rank()


def test_embed_says_which_classes_its_encoder_does_not_know(trained):
    root, folder = trained
    said = "labels are left out: not among the classes that r was trained on: eel\n"
    assert said not in command(folder, "embed", "r", "data/test", "-o", "a.npz")
    rename_class(root)
    assert said in command(folder, "embed", "r", "data/test", "-o", "b.npz")
    assert "labels" in np.load(folder.parent / "a.npz")
    assert "labels" not in np.load(folder.parent / "b.npz")
