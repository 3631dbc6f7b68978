"""Converters to the YOLO layout."""
