"""Trained models as scores: of variants for one."""
