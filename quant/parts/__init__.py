"""Part files: what a host holds that runs some layers of a model, or a share of every layer."""
