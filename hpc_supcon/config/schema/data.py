"""Data and views: sections `data` and `augment`."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from .base import Count, NonNegative, Options, Positive, Probability, Section
from .names import (
    AutoAugmentName,
    CropName,
    LoaderName,
    OwnPolicy,
    OwnSource,
    PolicyName,
    SamplerName,
    SourceName,
)

Channels = Annotated[int, Field(ge=1, le=64)]


class SyntheticConfig(Section):
    images: Count = Field(description="number of training images", json_schema_extra={"unit": "images"})
    classes: Annotated[int, Field(ge=2)] = Field(description="number of classes")
    channels: Channels = Field(description="1 is gray, 3 is RGB")
    image_size: Count = Field(description="side of the square images", json_schema_extra={"unit": "px"})
    bits: Literal[8, 16] = Field(description="of the levels: 8 gives 0..255, 16 gives 0..65535")


class ColumnsConfig(Section):
    image: str | None = Field(
        description="manifest: the column of paths, null: path, file, filename or image; huggingface: the column of "
        "images, null: the only one of the type Image; webdataset: the extension of the images, null: jpg, png ..."
    )
    label: str | None = Field(
        description="manifest: null: label, class, target or category; huggingface: null: the only ClassLabel; "
        "webdataset: the extension of the labels, such as txt, or json.label for an entry; null: cls"
    )
    split: str | None = Field(description="manifest: the column that says train, validation or test; null: split")


class DataConfig(Section):
    source: SourceName | OwnSource = Field(
        description="the data set; image_folder: train/CLASS/*.jpg; manifest: a table of paths and labels; "
        "huggingface: a set of the package datasets; webdataset: tars"
    )
    options: Options = Field(description="arguments of a source of your own, besides root; null: none")
    root: str | None = Field(
        description="folder that holds the data set (digits and synthetic need none); manifest: a .csv, .tsv or "
        ".parquet, or a folder with train.csv and test.csv; huggingface: a folder of save_to_disk or of Parquet "
        "files, or hf:OWNER/NAME; webdataset: a folder of tars, or a pattern such as {train,test}-{000..015}.tar"
    )
    columns: ColumnsConfig = Field(description="where a table or a tar has images and labels")
    image_root: str | None = Field(
        description="manifest: folder at which relative paths start; null: that of the manifest"
    )
    download: bool = Field(description="fetch a missing torchvision data set into data.root")
    image_size: Count | None = Field(
        description="resize the shorter side to this and crop the center; null keeps the images' own size",
        json_schema_extra={"unit": "px"},
    )
    channels: Channels | None = Field(
        description="convert every image to 1 (gray) or 3 (RGB) channels; any other number must be that of the "
        "images; null: all must have the same number"
    )
    exif: Literal["transpose", "ignore"] = Field(
        description="image files; transpose: images are turned upright by their EXIF orientation; ignore: they are "
        "read as stored"
    )
    labels: Literal["folders", "none"] = Field(
        description="folders: as the source gives them (image_folder: names of folders, train/CLASS/*.jpg); none: no "
        "labels, in an image_folder images at any depth of data.root, or of its folders train, val, test"
    )
    validation_fraction: Annotated[float, Field(ge=0, lt=1)] = Field(
        description="share of the training images set aside for validation, stratified, where the data set has no "
        "validation split of its own; 0: no validation"
    )
    train_images: Count | None = Field(
        description="train on this many images only, as many of each class as their shares give (drawn with seed)",
        json_schema_extra={"unit": "images"},
    )
    batch_size: Annotated[int, Field(ge=2)] = Field(
        description="GLOBAL number of images per optimizer step, over all ranks, before views",
        json_schema_extra={"unit": "images"},
    )
    views: Count | dict[CropName, Annotated[int, Field(ge=0)]] = Field(
        description="views of each image in a batch; {global: 2, local: 6}: of two sizes, the smaller local ones by "
        "augment.local (multi-crop; swav, dino)"
    )
    sampler: SamplerName = Field(
        description="which images share a batch; class_balanced: classes_per_batch x images_per_class; "
        "long_tail_aware: see long_tail_alpha"
    )
    classes_per_batch: Count | None = Field(description="class_balanced: different classes in every global batch")
    images_per_class: Count | None = Field(
        description="class_balanced: images of each of them; times classes_per_batch it is batch_size",
        json_schema_extra={"unit": "images"},
    )
    long_tail_alpha: Probability = Field(
        description="long_tail_aware: a class is drawn with probability ~ (its images) ** this; "
        "0 is balanced, 1 is as in the data"
    )
    beton: str | None = Field(
        description="read the images from these .beton files (made of data.source by `hpc-supcon convert`)"
    )
    loader: LoaderName = Field(
        description="resident: the whole set on the device, as it is stored; torch: worker processes; ffcv: .beton "
        "files; dali: image files, decoded by NVIDIA DALI; auto: the fastest one that fits"
    )
    workers: Count = Field(description="processes or threads that decode, per rank")
    timeout_s: Positive = Field(description="longest wait for one batch", json_schema_extra={"unit": "s"})
    on_corrupt: Literal["fail", "replace"] = Field(
        description="what happens when an image does not decode; replace: training takes another one in its place, "
        "evaluation leaves it out; both are counted"
    )
    allow_change: bool = Field(
        description="resume although the images or classes are not those that the run was started with, where the "
        "order of the images can still be served"
    )
    crop_while_decoding: bool = Field(
        description="the loader takes the random crops from the stored images, at full resolution (for large images)"
    )
    synthetic: SyntheticConfig = Field(description="the images of source=synthetic")

    @property
    def crops(self) -> tuple[int, int]:
        """How many global and local views each image has; views of one size are global."""
        if isinstance(self.views, int):
            return self.views, 0
        return self.views["global"], self.views.get("local", 0)

    @property
    def views_per_image(self) -> int:
        return sum(self.crops)

    @model_validator(mode="after")
    def _has_global_views(self) -> DataConfig:
        if not isinstance(self.views, int) and self.views.get("global", 0) < 1:
            raise ValueError("data.views: give the number of global views as well, such as {global: 2, local: 6}")
        return self


class RandAugmentConfig(Section):
    operations: Annotated[int, Field(ge=0)] = Field(description="operations on each view, one after the other")
    magnitude: Annotated[int, Field(ge=0, le=30)] = Field(description="strength of every operation, 0..30")


class LocalViewsConfig(Section):
    image_size: Count = Field(
        description="side of the local views, at most that of the images", json_schema_extra={"unit": "px"}
    )
    crop_scale: tuple[Positive, Positive] = Field(description="range of their crop's share of the image area")
    blur: Probability = Field(description="as augment.blur")
    solarize: Probability = Field(description="as augment.solarize")


ViewProbability = Probability | tuple[Probability, ...]
"""Of all views, or of each one."""


class AugmentConfig(Section):
    policy: PolicyName | OwnPolicy = Field(
        description="none: resize alone; flip_crop, pad_crop: crop and flip; simaugment: crop, flip, color jitter, "
        "gray, blur, solarization, for other than 1 or 3 channels crop, flip, blur; autoaugment, randaugment: crop, "
        "flip, their operations, for 8-bit images of 1 or 3 channels; policies of your own: crop, flip, what they do"
    )
    options: Options = Field(description="arguments of a policy of your own; null: none")
    crop: Literal["auto", "resized", "padded"] = Field(
        description="resized: a random part of the image, by crop_scale and crop_ratio, resized; padded: a square of "
        "the image's own size out of the padded image; auto: padded for policy=pad_crop, else resized"
    )
    padding: Count = Field(description="padded: pixels added on each side", json_schema_extra={"unit": "px"})
    padding_mode: Literal["zeros", "reflect"] = Field(
        description="padded: what they are: black, or the image mirrored"
    )
    crop_scale: tuple[Positive, Positive] = Field(description="range of the crop's share of the image area")
    crop_ratio: tuple[Positive, Positive] = Field(description="range of the crop's width / height")
    flip: Probability = Field(description="probability of a horizontal flip")
    brightness: NonNegative = Field(description="simaugment: factor drawn from 1 -+ this")
    contrast: NonNegative = Field(description="simaugment: factor drawn from 1 -+ this")
    saturation: NonNegative = Field(description="simaugment: factor drawn from 1 -+ this")
    hue: Annotated[float, Field(ge=0, le=0.5)] = Field(
        description="simaugment: shift drawn from -+ this", json_schema_extra={"unit": "turns"}
    )
    jitter_probability: Probability = Field(description="simaugment: probability that a view is color-jittered")
    grayscale: Probability = Field(description="simaugment: probability that a view loses its color")
    blur: ViewProbability = Field(
        description="simaugment: probability of a gaussian blur, sigma 0.1..2 px, kernel a tenth of the image; a "
        "list has one for each view, such as [1.0, 0.1]"
    )
    solarize: ViewProbability = Field(
        description="simaugment: probability that the brighter half of the levels is inverted; a list has one for "
        "each view, such as [0.0, 0.2] (byol, barlow_twins)"
    )
    autoaugment: AutoAugmentName = Field(description="autoaugment: the policy that was learned on this data set")
    randaugment: RandAugmentConfig = Field(description="randaugment: how many operations, how strong")

    local: LocalViewsConfig = Field(
        description="the local views of data.views={global: 2, local: 6}; all other settings are those of the global "
        "ones"
    )

    @property
    def is_padded(self) -> bool:
        """Whether crops are squares of the padded image."""
        return self.policy != "none" and (
            self.crop == "padded" or (self.crop == "auto" and self.policy == "pad_crop")
        )

    def of_one_view(self) -> AugmentConfig:
        """The same, where each image has one view: with the probabilities of the first one."""
        one = {k: v[0] for k in ("blur", "solarize") if isinstance(v := getattr(self, k), tuple)}
        return self.model_copy(update=one)

    @model_validator(mode="after")
    def _ordered(self) -> AugmentConfig:
        ranges = {
            "crop_scale": self.crop_scale,
            "crop_ratio": self.crop_ratio,
            "local.crop_scale": self.local.crop_scale,
        }
        for name, (low, high) in ranges.items():
            if low > high:
                raise ValueError(f"augment.{name}: {low} is above {high}; give [low, high]")
            if high > 1 and name != "crop_ratio":
                raise ValueError(f"augment.{name}: a crop cannot be larger than the image (at most 1.0)")
        return self
