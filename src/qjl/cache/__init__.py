"""Tokens of a cache, in exact slots and in pages of codes."""
