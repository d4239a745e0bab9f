"""Attention maps of teacher and student: as pictures, as numbers, as files."""
