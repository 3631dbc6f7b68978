"""Converters into YOLO layout."""
