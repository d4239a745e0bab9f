"""Attention maps of teacher and student, as pictures."""

from vitkd_cli.inspection.picture import attention_picture

__all__ = ["attention_picture"]
