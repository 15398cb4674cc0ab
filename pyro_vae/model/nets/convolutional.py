"""A small pair of convolutional networks."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from pyro_vae.model.component import Component
from pyro_vae.rows import positive


class ConvEncoder(Component):
    """A small convolutional body for a guide, images (..., C*H*W) -> features (..., out_features).

    Each layer halves height and width (3 x 3, stride 2).

    Args:
        shape: (C, H, W) of one image; rows are flat and reshaped inside.
        channels: of each layer.
        out_features: width of the dense layer at the end.
    """

    def __init__(self, shape: Sequence[int], channels: Sequence[int] = (32, 64), out_features: int = 128) -> None:
        super().__init__()
        self.shape, self.channels, self.out_features = _image_shape(shape), _some(channels), out_features
        positive(out_features=out_features)
        layers: list[nn.Module] = []
        for before, after in zip((self.shape[0], *channels), channels, strict=False):
            layers += [nn.Conv2d(before, after, 3, stride=2, padding=1), nn.SiLU()]
        self.convolutions = nn.Sequential(*layers)
        height, width = _sizes(self.shape, len(self.channels))[-1]
        self.dense = nn.Sequential(nn.Linear(channels[-1] * height * width, out_features), nn.SiLU())

    def settings(self) -> dict[str, Any]:
        """See `Component.settings`."""
        return {"shape": self.shape, "channels": self.channels, "out_features": self.out_features}

    def forward(self, x: Tensor) -> Tensor:
        """(..., C*H*W) -> (..., out_features)."""
        images = _as_images(x, self.shape)
        features: Tensor = self.dense(self.convolutions(images).flatten(1))
        return features.reshape(*x.shape[:-1], self.out_features)


class ConvDecoder(Component):
    """The mirror image of `ConvEncoder`, latents (..., latent_dim) -> flat images (..., C*H*W).

    Args:
        latent_dim: D.
        shape: (C, H, W) of one image.
        channels: from the smallest picture to the largest.
    """

    def __init__(self, latent_dim: int, shape: Sequence[int], channels: Sequence[int] = (64, 32)) -> None:
        super().__init__()
        self.latent_dim, self.shape, self.channels = latent_dim, _image_shape(shape), _some(channels)
        positive(latent_dim=latent_dim)
        sizes = _sizes(self.shape, len(self.channels))[::-1]
        self.start = (self.channels[0], *sizes[0])
        self.dense = nn.Sequential(nn.Linear(latent_dim, self.start[0] * sizes[0][0] * sizes[0][1]), nn.SiLU())
        layers: list[nn.Module] = []
        widths = (*self.channels, self.shape[0])
        for i, (before, after) in enumerate(pairwise(widths)):
            # Output size of a transposed convolution is 2 n - 1 + output_padding: the padding makes odd sizes exact.
            padding = (sizes[i + 1][0] - (2 * sizes[i][0] - 1), sizes[i + 1][1] - (2 * sizes[i][1] - 1))
            layers += [nn.ConvTranspose2d(before, after, 3, stride=2, padding=1, output_padding=padding), nn.SiLU()]
        self.convolutions = nn.Sequential(*layers[:-1])

    @property
    def in_features(self) -> int:
        """D, as for an MLP."""
        return self.latent_dim

    @property
    def out_features(self) -> int:
        """C*H*W."""
        return self.shape[0] * self.shape[1] * self.shape[2]

    def settings(self) -> dict[str, Any]:
        """See `Component.settings`."""
        return {"latent_dim": self.latent_dim, "shape": self.shape, "channels": self.channels}

    def forward(self, z: Tensor) -> Tensor:
        """(..., latent_dim) -> (..., C*H*W)."""
        start = self.dense(z.reshape(-1, self.latent_dim)).reshape(-1, *self.start)
        images: Tensor = self.convolutions(start)
        return images.reshape(*z.shape[:-1], self.out_features)


def _image_shape(shape: Sequence[int]) -> tuple[int, int, int]:
    if len(shape) == 2:
        shape = (1, *shape)
    if len(shape) != 3:
        raise ValueError(f"shape={tuple(shape)} must be (channels, height, width) or (height, width) of one image.")
    return int(shape[0]), int(shape[1]), int(shape[2])


def _some(channels: Sequence[int]) -> tuple[int, ...]:
    if not channels:
        raise ValueError("channels=() makes no convolution: give the channels of at least one layer, such as (32, 64).")
    return tuple(channels)


def _sizes(shape: tuple[int, int, int], num_layers: int) -> list[tuple[int, int]]:
    """Height and width before, between and after layers that halve them, rounding up."""
    sizes = [shape[1:]]
    for _ in range(num_layers):
        sizes.append(((sizes[-1][0] + 1) // 2, (sizes[-1][1] + 1) // 2))
    return sizes


def _as_images(x: Tensor, shape: tuple[int, int, int]) -> Tensor:
    if x.shape[-1] != torch.Size(shape).numel():
        raise ValueError(
            f"This network takes flat images of {shape} = {torch.Size(shape).numel()} columns, "
            f"but was given shape {tuple(x.shape)}: give rows x.flatten(1)."
        )
    return x.reshape(-1, *shape)
