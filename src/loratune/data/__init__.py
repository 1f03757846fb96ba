"""Rows from a file or hub to token rows with loss masks, splits and orders."""
