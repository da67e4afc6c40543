"""What a model learns: the objective of a training step, and its evaluation."""
