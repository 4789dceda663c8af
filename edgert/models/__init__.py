"""The embedded models, package data: a tiny chat model and its draft model, each with its card."""
