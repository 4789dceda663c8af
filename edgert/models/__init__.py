"""The embedded models, package data: a tiny chat model, its draft model, one of experts; cards."""
