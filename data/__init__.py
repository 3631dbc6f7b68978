"""Data set descriptions and converters."""
