"""Nested precision: one code of which every prefix of bits is a code of lower width."""
