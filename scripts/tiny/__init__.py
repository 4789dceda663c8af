"""Parts of `scripts/train_tiny.py`: the training of the models embedded in edgert."""
