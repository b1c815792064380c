"""Slides in, captioned patches out (PathGen-1.6M, arXiv:2407.00203, section 3)."""
