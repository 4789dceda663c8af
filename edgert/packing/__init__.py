"""Materialises what each host of a manifest needs, as files by content and a folder per host."""
