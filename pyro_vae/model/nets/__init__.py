"""Networks: plain `nn.Module`s, no probability.

All of them take any number of leading batch dimensions, so that particles (K, N, ...) go through in one call. The default
activation is smooth (SiLU), because posterior modes and curvatures are found by second derivatives.
"""

from pyro_vae.model.nets.conditional import Conditional
from pyro_vae.model.nets.convolutional import ConvDecoder, ConvEncoder
from pyro_vae.model.nets.log1p import Log1p
from pyro_vae.model.nets.mlp import MLP

__all__ = ["MLP", "Conditional", "ConvDecoder", "ConvEncoder", "Log1p"]
