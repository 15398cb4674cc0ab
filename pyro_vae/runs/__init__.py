"""Runs on the disk, for the command line: the one place where names turn into objects."""

from pyro_vae.runs.arguments import Arguments
from pyro_vae.runs.run import About, Run

__all__ = ["About", "Arguments", "Run"]
