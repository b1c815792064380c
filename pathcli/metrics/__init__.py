"""Numbers with intervals: classification, calibration, localisation, statistics."""
