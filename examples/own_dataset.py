"""A data set of one's own: any torch Dataset whose items are (image, label), or images with data.labels=none.

hpc-supcon run quickstart data.source=own_dataset:splits data.options.images=2000
"""

import torch


class Stripes(torch.utils.data.Dataset):  # images: PIL, uint8 tensors [C, H, W] or uint8 arrays [H, W, C]
    classes = ("rows", "columns")

    def __init__(self, images, seed):
        self.pixels = torch.randint(0, 256, (images, 1, 16, 1), generator=torch.Generator().manual_seed(seed)).byte()
        self.targets = [i % 2 for i in range(images)]  # by which labels are known without reading every image

    def __len__(self):
        return len(self.targets)

    def __getitem__(self, i):
        image, label = self.pixels[i].expand(1, 16, 16), self.targets[i]
        return image.mT if label else image, label


def splits(root, images=1000):  # root is data.root
    return {"train": Stripes(images, 0), "test": Stripes(100, 1)}
