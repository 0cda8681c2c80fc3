"""Claims about settings of the sources of a user's own images."""

from __future__ import annotations

import pytest

from hpc_supcon.config import load_config
from hpc_supcon.errors import ConfigError

SELF_SUPERVISED = ["data.labels=none", "loss.name=simclr", "validation.probe.kind=none"]
OWN = ["image_folder", "manifest", "huggingface", "webdataset"]


@pytest.mark.parametrize("source", OWN)
def test_images_of_a_user_may_have_no_labels_and_may_be_read_by_dali(source):
    load_config("default", [f"data.source={source}", *SELF_SUPERVISED], stages=("pretrain",))
    load_config("default", [f"data.source={source}", "data.loader=dali"], stages=("pretrain",))
    load_config("default", [f"data.source={source}", "data.validation_fraction=0"], stages=("pretrain",))


@pytest.mark.parametrize("source", OWN[1:])
def test_columns_are_of_tables_and_tars(source):
    config = load_config("default", [f"data.source={source}", "data.columns={image: a, label: b}"])
    assert (config.data.columns.image, config.data.columns.label, config.data.columns.split) == ("a", "b", None)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["data.columns.label=x"],
            r"data.columns.label=x: data.source=digits has no such column, but manifest, hugg",
        ),
        (
            ["data.columns.image=x", "data.source=image_folder"],
            r"data.columns.image=x: data.source=image_folder has no",
        ),
        (
            ["data.columns.split=x", "data.source=huggingface"],
            r"data.columns.split=x: .* no such column, but manifest:",
        ),
        (["data.image_root=x", "data.source=webdataset"], r"data.image_root=x: that is of data.source=manifest"),
        (["data.source=cifar10", *SELF_SUPERVISED], r"data.labels=none is for data.source=image_folder, manifest"),
        (
            ["data.source=cifar10", "data.loader=dali"],
            r"data.loader=dali reads image files: use data.source=image_fold",
        ),
        (["data.source=webdatset"], r"did you mean 'webdataset'"),
        (["probe.transfer=[manifest]"], r"probe.transfer=manifest: name its folder as manifest:PATH"),
    ],
)
def test_refused(overrides, message):
    with pytest.raises(ConfigError, match=message):
        load_config("default", overrides, stages=("pretrain", "probe"))


def test_sets_of_one_kind_in_two_places_are_two_sets():
    overrides = ["probe.transfer=[manifest:a.csv, manifest:b.csv, 'huggingface:hf:o/n']"]
    config = load_config("default", overrides, stages=("pretrain", "probe"))
    assert config.probe.transfer_sets[2] == ("huggingface:hf:o/n", "huggingface", "hf:o/n")
