"""The trainer: spends a budget on a model, a source and a list of methods."""
