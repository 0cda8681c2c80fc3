"""An encoder of one's own: a module that is given the images' channels and size, and tells the size of its features.

hpc-supcon run quickstart model.encoder=own_encoder:Patches model.options.width=96
"""

from torch import nn


class Patches(nn.Module):
    def __init__(self, in_channels, image_size, out_dim, *, width=64, patch=2):
        super().__init__()
        self.feature_dim = out_dim or width
        self.embed = nn.Conv2d(in_channels, width, patch, stride=patch)
        self.mix = nn.Sequential(nn.Conv2d(width, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU())
        self.latent = nn.Linear(width, self.feature_dim)

    def forward(self, images):  # [N, in_channels, image_size, image_size] -> [N, feature_dim]
        maps = self.embed(images)
        return self.latent((maps + self.mix(maps)).mean(dim=(2, 3)))
