"""Weight formats, bounds-checked model files and what their metadata says about a model."""
