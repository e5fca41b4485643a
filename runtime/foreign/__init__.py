"""Modules of other packages: found by tracing, cut into stages, trained as any other plan's model."""
