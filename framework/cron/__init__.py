"""Recurring jobs: when they are due, and publishing them then."""
