"""Hosts that work together: who they are, and the links between them."""
