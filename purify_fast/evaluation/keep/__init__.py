"""Rows on disk: the folder in which they are kept, and what tells one model from another."""
