"""Estimators of the meta-gradient, all with one signature."""
