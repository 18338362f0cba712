"""Calibration: who may share tokens in a dense model, found on text, and what that costs on other text."""
