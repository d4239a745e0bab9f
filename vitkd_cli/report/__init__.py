"""Runs → tables, pictures and a page."""
