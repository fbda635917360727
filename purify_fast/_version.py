"""The package's version, in a separate module that every module can read without importing the package."""

__version__ = "0.1.0"
