"""What is assumed: a prior p(z), a likelihood p(x | z), a guide q(z | x), and the networks inside them."""
