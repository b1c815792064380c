"""Runs that measure or show: each takes a slide or a data set and gives a report."""
