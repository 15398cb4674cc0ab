"""Distributions that Pyro does not have, or has in a form that would not serve here."""
