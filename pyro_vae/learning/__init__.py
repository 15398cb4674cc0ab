"""How the parameters are found: objectives, the training loop, its history and checkpoints."""
