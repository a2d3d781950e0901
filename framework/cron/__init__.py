"""Recurring jobs: computing when they are due, and publishing them."""
