"""Nouns that two or more components share: frozen values, standard library only."""
