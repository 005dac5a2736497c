"""Orthrus inside other people's engines; each part is optional and importable alone, and nothing imports them."""
