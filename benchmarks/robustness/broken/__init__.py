"""Test the reports of this package on rebuilt defences that were broken, and on models that are robust as claimed."""
