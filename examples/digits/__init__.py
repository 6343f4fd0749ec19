"""Scikit-learn's handwritten digits (8 x 8 pixels, ten classes), split over sites."""
