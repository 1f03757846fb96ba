"""Scoring trained adapters on tasks."""
