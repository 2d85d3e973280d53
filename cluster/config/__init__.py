"""The configuration: one schema, frozen; file < environment < flag; every value knows where it came from."""
