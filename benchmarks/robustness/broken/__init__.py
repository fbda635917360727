"""Test the reports of this package on small copies of broken published defences, and on models that are robust."""
