"""Training tasks: the objective of a training step, and its evaluation."""
