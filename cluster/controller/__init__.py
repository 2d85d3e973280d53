"""Desired against observed: the one place that starts, watches, rebuilds and ends replicas."""
