"""Mixture of experts: which experts are in memory, and how they get there while a pass runs."""
